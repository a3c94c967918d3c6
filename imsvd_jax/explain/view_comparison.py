"""The pass over two augmented views of every image: do their codes agree?"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base import console, devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import accumulate, information
from imsvd_jax.explain import sums as sums_lib
from imsvd_jax.explain.analysis import Views
from imsvd_jax.explain.images import TwoViews, padded_batches
from imsvd_jax.explain.subject import Subject


def compare_views(
  subject: Subject,
  views: TwoViews,
  shape: tuple[int, int],
  *,
  examples: np.ndarray,
  mesh: Mesh,
  joint: bool = True,
  count: int | None = None,
  report: Callable[[str], None] = console.print_line,
) -> Views:
  """Streams over two views of every image once, for a code of shape (M, b).

  Keeps the images of ascending indices `examples` [n] with their views. `joint`
  says whether to measure the D x D cross-joint matrix.

  Raises:
    UserError: There are no views.
  """
  view_pass = accumulate.view_pass(
    subject.encode, views.augment, shape, mesh=mesh, joint=joint
  )
  variables = jax.device_put(subject.variables, devices.replicated(mesh))
  meter = console.Progress("views", count, report=report)
  sums = view_pass.start()
  crops: dict[int, np.ndarray] = {}
  for batch in padded_batches(views.crops(), mesh.size):
    sums, _ = view_pass.step(variables, sums, batch)
    for row in np.flatnonzero(np.isin(batch["index"], examples)):
      crops[int(batch["index"][row])] = batch["views"][row]
    meter.add(int(sums.count) - meter.done)  # Waits for the devices.
  missing = [int(i) for i in examples if int(i) not in crops]
  if missing or not meter.done:
    raise UserError(
      f"Found no views of image {missing[0] if missing else 0}; give two views"
      " of every image of the data set."
    )
  meter.finish()
  return Views(
    **_numbers(sums, shape),
    **_examples(subject, views, {int(i): crops[int(i)] for i in examples}),
  )


def _numbers(
  sums: accumulate.ViewSums, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
  num_variables, num_bins = shape
  count = int(sums.count)
  numbers = {
    "agreement": sums.agreement.value() / count,
    "soft_agreement": sums.soft_agreement.value() / count,
  }
  if sums.cross_joint is not None:
    cross_joint = sums_lib.mean_matrix(
      sums.cross_joint, num_variables * num_bins, count
    )
    numbers["cross_joint"] = cross_joint
    numbers["cross_mutual_information"] = information.mutual_information(
      cross_joint, num_bins
    )
  return numbers


def _examples(
  subject: Subject, views: TwoViews, crops: dict[int, np.ndarray]
) -> dict[str, np.ndarray]:
  """Augments a few images as the pass did, and encodes both views."""
  indices = np.array(list(crops), np.int64)
  stacked = np.stack(list(crops.values()))
  pixels = jax.jit(views.augment)(stacked, indices.astype(np.int32))
  encode = jax.jit(subject.encode)
  codes = [encode(subject.variables, x).probabilities for x in pixels]
  shown = jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
  return {
    "example_indices": indices,
    "example_views": np.asarray(shown).swapaxes(0, 1),
    "example_probabilities": np.stack([np.asarray(q) for q in codes], 1),
  }
