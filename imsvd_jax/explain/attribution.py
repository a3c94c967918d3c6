"""Which pixels make an image fall into a bin.

The score of bin d of variable m is its log-odds

    s = log q(m, d) - log sum_{d' != d} q(m, d')

and not log q(m, d), whose gradient vanishes where the bin is certain, which
is on the images that one wants explained.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base import devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain.subject import Subject

# Points on the path of integrated gradients. Measured on a trained encoder: the
# sum over pixels errs by 5%, as with 32 points of the midpoint rule.
DEFAULT_STEPS = 16


def log_odds(
  log_probabilities: jax.Array, variables: jax.Array, bins: jax.Array
) -> jax.Array:
  """Returns [B] nats, the log-odds of one bin per image.

  Of log-probabilities [B, M, b]; `variables` and `bins` are int [B].
  """
  place = jnp.arange(log_probabilities.shape[0])
  chosen = log_probabilities[place, variables]  # [B, b]
  number = jnp.arange(chosen.shape[1])
  others = jnp.where(number == bins[:, None], -jnp.inf, chosen)
  return chosen[place, bins] - jax.nn.logsumexp(others, axis=1)


def _functions(subject: Subject) -> tuple[Callable, Callable]:
  """Returns (feature_maps, bin_log_probabilities) of a subject."""
  maps, log_probabilities = subject.feature_maps, subject.bin_log_probabilities
  if maps is None or log_probabilities is None:
    raise UserError(
      "Attribution needs feature maps and bin log-probabilities; this encoder "
      "has none (no discrete code, or a backbone without spatial features)."
    )
  return maps, log_probabilities


def make_grad_cam(subject: Subject) -> Callable[..., jax.Array]:
  """Compiles Grad-CAM (Selvaraju et al., 2017) of single bins.

  weight_k = mean over positions of ds / dA_k;  map = relu(sum_k weight_k A_k)

  Returns:
    (model variables, images [U, H, W, C], rows [B], variables [B], bins [B]) ->
    [B, h, w] float32 >= 0, in units of log-odds per position. Map i is of
    image rows[i]; an image goes through the backbone once.
  """
  feature_maps, log_probabilities = _functions(subject)

  @jax.jit
  def grad_cam(
    weights: Any,
    images: jax.Array,
    rows: jax.Array,
    variables: jax.Array,
    bins: jax.Array,
  ) -> jax.Array:
    state = feature_maps(weights, images)
    state = jax.tree.map(lambda x: x[rows], state)

    def score(state: Any) -> jax.Array:
      log_q = log_probabilities(weights, state)
      return log_odds(log_q, variables, bins).sum()

    # Of a ViT's state, the patches alone have a place.
    maps = jax.tree.leaves(state)[0]  # [B, h, w, K]
    gradient = jax.tree.leaves(jax.grad(score)(state))[0]
    weight = gradient.mean((1, 2), keepdims=True)  # [B, 1, 1, K]
    return jax.nn.relu((weight * maps).sum(-1)).astype(jnp.float32)

  return grad_cam


def make_integrated_gradients(
  subject: Subject, *, steps: int = DEFAULT_STEPS
) -> Callable[..., jax.Array]:
  """Compiles integrated gradients (Sundararajan et al., 2017) of single bins.

  a = (x - x0) * mean over the path from x0 to x of ds / dx, by the
  Gauss-Legendre rule; its sum over pixels is s(x) - s(x0) up to the rule's
  error. The baseline x0 is the image's own mean color.

  Args:
    steps: Points on the path; each costs a forward and a backward pass.

  Returns:
    (model variables, images [U, H, W, C] in 0..255, rows [B], variables [B],
    bins [B]) -> [B, H, W] float32, signed, summed over channels, in log-odds.
    Map i is of image rows[i].
  """
  feature_maps, log_probabilities = _functions(subject)

  nodes, shares = np.polynomial.legendre.leggauss(steps)  # On -1..1.
  fractions = ((nodes + 1) / 2).astype(np.float32)
  shares = (shares / 2).astype(np.float32)

  def score(
    images: jax.Array, weights: Any, variables: jax.Array, bins: jax.Array
  ) -> jax.Array:
    maps = feature_maps(weights, images)
    log_q = log_probabilities(weights, maps)
    return log_odds(log_q, variables, bins).sum()

  @jax.jit
  def integrated(
    weights: Any,
    images: jax.Array,
    rows: jax.Array,
    variables: jax.Array,
    bins: jax.Array,
  ) -> jax.Array:
    images = images[rows].astype(jnp.float32)
    baseline = images.mean((1, 2), keepdims=True)

    def body(
      total: jax.Array, node: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
      fraction, share = node
      point = baseline + fraction * (images - baseline)
      slope = jax.grad(score)(point, weights, variables, bins)
      return total + share * slope, None

    total, _ = jax.lax.scan(body, jnp.zeros_like(images), (fractions, shares))
    return ((images - baseline) * total).sum(-1)

  return integrated


def attribute(
  compiled: Callable[..., jax.Array],
  subject: Subject,
  images: np.ndarray,
  targets: np.ndarray,
  *,
  room: tuple[int, int],
  mesh: Mesh,
) -> np.ndarray:
  """Makes maps of single bins of images, spread over the devices.

  Args:
    compiled: From `make_grad_cam` or `make_integrated_gradients`.
    subject: What is explained.
    images: uint8 [U, H, W, C].
    targets: int [n, 3], the image among `images`, the variable and the bin of
      each map.
    room: Images and targets that the compiled program takes; both are padded
      to it, and the devices must divide it.
    mesh: The devices.

  Returns:
    float32 [n, h, w].
  """
  wanted = devices.pad_rows(targets.astype(np.int32), room[1])
  batch = [devices.pad_rows(images, room[0]), *np.ascontiguousarray(wanted.T)]
  placed = jax.device_put(batch, devices.batch_sharded(mesh))
  maps = compiled(subject.variables, *placed)
  return np.asarray(maps)[: len(targets)]


def unit_maps(maps: np.ndarray) -> np.ndarray:
  """Scales each map to 0..1 by its largest magnitude, negative parts to 0."""
  positive = np.maximum(maps, 0)
  peak = positive.max((-2, -1), keepdims=True)
  return np.divide(positive, peak, out=np.zeros_like(positive), where=peak > 0)


def resize_maps(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Bilinear resize of [n, h, w] maps to [n, *size]."""
  shape = (len(maps), *size)
  resized = jax.image.resize(maps, shape, "linear", antialias=True)
  return np.asarray(resized)


def overlay(
  images: np.ndarray,
  maps: np.ndarray,
  *,
  colormap: np.ndarray,
  strength: float = 0.65,
) -> np.ndarray:
  """Lays attribution maps over images.

  Args:
    images: uint8 [n, H, W, C], C = 1 or 3.
    maps: [n, h, w], any scale.
    colormap: [256, 3] uint8, from weak to strong.
    strength: Opacity where the map is largest.

  Returns:
    uint8 [n, H, W, 3]; untouched where the map is 0.
  """
  heat = np.clip(resize_maps(unit_maps(maps), images.shape[1:3]), 0, 1)
  colors = colormap[np.rint(heat * 255).astype(np.uint8)].astype(np.float32)
  alpha = strength * heat[..., None]
  mixed = (1 - alpha) * images.astype(np.float32) + alpha * colors
  return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
