"""Images that repeat others, by the cosine of their features."""

from collections.abc import Iterable

# Least cosine of near duplicates; see docs/image_search.md.
THRESHOLD = 0.995


def first_of(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
  """Returns the first image of the group of each image that repeats one.

  Groups are stars: every image is a duplicate of the first one. Chains of
  pairs would join images that differ.

  Args:
    pairs: Numbers of images that are alike, in any order.
  """
  found: dict[int, int] = {}
  for first, other in sorted({tuple(sorted(pair)) for pair in pairs}):
    # The first ones come in order: a later one that has its own is none.
    if first != other and first not in found:
      found.setdefault(other, first)
  return found
