"""Every objective against the float64 references, on many random inputs.

  python -m tests.objectives.oracle

prints a table: the worst relative difference of value and gradient over 1,000
random inputs of each of five sizes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imsvd_jax.objectives import OBJECTIVES
from imsvd_jax.objectives.superinfo import standard_noise
from tests.objectives import numpy_objectives as reference

NUM_INPUTS = 1000
NUM_GLOBAL = 2
STEP = 1e-5  # Of finite differences, as a share of the embeddings' scale.


class Size(NamedTuple):
  images: int
  entries: int
  num_bins: int
  views: int


SIZES = (
  Size(8, 8, 4, 2),
  Size(12, 6, 3, 3),
  Size(16, 12, 6, 4),
  Size(24, 20, 5, 2),
  Size(48, 32, 8, 2),
)


class Worst(NamedTuple):
  """Worst relative differences over the inputs of a size.

  Attributes:
    value: Of the loss and of each term; relative to 1 where that is larger.
    gradient: Of the slope along one random direction per input, relative to
      the length of the gradient over the square root of its number of entries,
      the root mean square of such slopes.
  """

  value: float
  gradient: float


def random_views(rng, size, count):
  """Returns views [V, N, D] and their scale; float64, exact in float32.

  Images are more or less alike (up to a cosine of one half), and so are views;
  the scale is between 0.1 and 10.
  """
  scale = 10 ** rng.uniform(-1, 1)
  shape = (size.images, size.entries)
  center = rng.uniform(0, 1) * rng.normal(size=size.entries)
  images = rng.normal(size=shape)
  noise = rng.uniform(0.3, 1) * rng.normal(size=(count, *shape))
  return np.float64(np.float32(scale * (center + images + noise))), scale


def settings_of(name, size):
  """Returns the hyper-parameters that differ from the defaults."""
  if OBJECTIVES[name].discrete:
    return {"num_bins": size.num_bins}
  return {"group_size": size.images} if name == "mveb" else {}


def expected(name, size, zs, targets, noise):
  """Returns the reference as a function of the views."""
  arguments = settings_of(name, size)
  if name == "mveb":
    scores = reference.mveb_scores(zs, size.images)
    arguments |= {"targets": targets, "scores": scores}
  if name == "superinfo":
    arguments["noise"] = noise
  function = getattr(reference, name)
  return lambda zs: function(list(zs), num_global=NUM_GLOBAL, **arguments)


def worst(name, size, num_inputs=NUM_INPUTS):
  """Returns the worst relative differences of one objective at one size."""
  rng = np.random.default_rng(0)
  draws = [random_views(rng, size, size.views) for _ in range(num_inputs)]
  views = [views for views, _ in draws]
  targets = [random_views(rng, size, NUM_GLOBAL)[0] for _ in draws]
  key = jax.random.key(0)
  half = jnp.zeros((size.images, size.entries // 2))
  noise = np.float64(standard_noise(key, size.views, half))
  loss = partial(
    OBJECTIVES[name].loss,
    num_global=NUM_GLOBAL,
    key=key,
    **settings_of(name, size),
  )
  call = lambda zs, targets: loss(list(zs), targets=list(targets))
  function = jax.value_and_grad(call, has_aux=True)
  ours = jax.jit(lambda xs: jax.lax.map(lambda x: function(*x), xs))
  to_float32 = lambda x: jnp.asarray(np.array(x), jnp.float32)
  found = ours((to_float32(views), to_float32(targets)))
  values, gradients = jax.tree.map(np.float64, found)

  differences = []
  for i, (zs, scale) in enumerate(draws):
    exact = expected(name, size, zs, targets[i], noise)
    value = jax.tree.map(lambda x, i=i: x[i], values)
    direction = rng.normal(size=zs.shape)
    direction /= np.linalg.norm(direction)
    step = STEP * scale
    sides = [exact(zs + sign * step * direction)[0] for sign in (1, -1)]
    slope = (sides[0] - sides[1]) / (2 * step)
    typical = np.linalg.norm(gradients[i]) / np.sqrt(zs.size)
    difference = abs((gradients[i] * direction).sum() - slope) / typical
    differences.append((_relative(value, exact(zs)), difference))
  return Worst(*np.max(differences, axis=0))


def _relative(found, exact):
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
  return max(abs(a - b) / max(abs(b), 1) for a, b in pairs)


def main():
  heads = [f"N {s.images}, D {s.entries}, V {s.views}" for s in SIZES]
  print(f"| | {' | '.join(heads)} |")
  print(f"|---|{'---|' * len(SIZES)}")
  for name in OBJECTIVES:
    cells = [worst(name, size) for size in SIZES]
    texts = [f"{c.value:.0e}, {c.gradient:.0e}" for c in cells]
    print(f"| `{name}` | {' | '.join(texts)} |", flush=True)


if __name__ == "__main__":
  main()
