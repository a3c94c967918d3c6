"""From two views to V: each global view is paired with every other view.

With multi-crop an image has G global views and V - G local crops. A loss of
two views becomes a loss of V by its mean over the pairs of a global view with
every other view, each unordered pair once: (V = 2, G = 2) is one pair and
exactly the two-view loss, (V = 8, G = 2) is 1 + 2 * 6 = 13 pairs. Two local
crops are never paired, because they may share nothing of the image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from imsvd_jax.base.errors import UserError
from imsvd_jax.objectives.checks import check_embeddings
from imsvd_jax.objectives.collectives import AxisName

Terms = dict[str, jax.Array]


def view_pairs(num_views: int, num_global: int) -> list[tuple[int, int]]:
  """Returns the pairs (global view, other view), each unordered pair once."""
  if not 1 <= num_global <= num_views or num_views < 2:
    raise UserError(
      f"{num_global} global of {num_views} views; expected two views or more,"
      " of which at least one is global."
    )
  return [(g, v) for g in range(num_global) for v in range(g + 1, num_views)]


def mean_over_pairs(
  pair_loss: Callable[[int, int], tuple[jax.Array, Terms]],
  num_views: int,
  num_global: int,
) -> tuple[jax.Array, Terms]:
  """Returns the mean loss and terms of `pair_loss(view, view)` over pairs."""
  pairs = view_pairs(num_views, num_global)
  results = [pair_loss(first, second) for first, second in pairs]
  return jax.tree.map(lambda *values: sum(values) / len(pairs), *results)


def over_view_pairs(two_view_loss: Callable) -> Callable:
  """Returns the V-view form of `two_view_loss(z1, z2, *, axis_name, ...)`.

  Work that pairs share (the softmax of a view) is written once per pair and
  merged by the compiler.
  """

  def loss(
    embeddings: Sequence[jax.Array],
    *,
    num_global: int = 2,
    targets: Sequence[jax.Array] | None = None,
    key: jax.Array | None = None,
    axis_name: AxisName = None,
    **hyperparameters: Any,
  ) -> tuple[jax.Array, Terms]:
    del targets, key  # Only objectives that say so use them.
    check_embeddings(embeddings)

    def pair_loss(first: int, second: int) -> tuple[jax.Array, Terms]:
      return two_view_loss(
        embeddings[first],
        embeddings[second],
        axis_name=axis_name,
        **hyperparameters,
      )

    return mean_over_pairs(pair_loss, len(embeddings), num_global)

  loss.__name__ = two_view_loss.__name__
  loss.__doc__ = f"V-view form of `{two_view_loss.__name__}`; see views.py."
  return loss
