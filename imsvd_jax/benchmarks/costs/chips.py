"""Published numbers of TPU chips, and the slices of them that exist.

All numbers are per chip, from the public Cloud TPU documentation
(docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, read in 2025). It gives
the interconnect in both directions and over all links of a chip; here it is
divided into one direction of one link. The page of v4 gives no interconnect:
its number is from the TPU v4 paper (arXiv:2304.01433, table 4), 6 links of
50 GB/s.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
  """One kind of chip."""

  name: str  # As in --topology.
  hbm_bytes: float  # Memory capacity, bytes.
  flops: float  # Peak of the matrix units at bfloat16, FLOP/s.
  hbm_bandwidth: float  # Bytes/s.
  link_bandwidth: float  # Bytes/s in one direction of one link to a neighbor.
  dimensions: int  # Of the torus or mesh that slices are cut from.
  wraps_at: int  # The least size at which a dimension of a slice is a ring.
  source: str  # Of the numbers.

  @property
  def ridge(self) -> float:
    """FLOP per byte above which arithmetic, not memory, is the limit."""
    return self.flops / self.hbm_bandwidth


_DOCS = "docs.cloud.google.com/tpu/docs/"

CHIPS: dict[str, Chip] = {
  "v4": Chip(
    "v4", 32 * GIB, 275e12, 1200e9, 50e9, 3, 4, f"{_DOCS}v4; arXiv:2304.01433"
  ),
  "v5e": Chip("v5e", 16 * GIB, 197e12, 819e9, 50e9, 2, 16, f"{_DOCS}v5e"),
  "v5p": Chip("v5p", 95 * GIB, 459e12, 2765e9, 100e9, 3, 4, f"{_DOCS}v5p"),
  "v6e": Chip("v6e", 32 * GIB, 918e12, 1638e9, 100e9, 2, 16, f"{_DOCS}v6e"),
}

# The documented slices of the two-dimensional chips.
SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


def links_per_chip(chip: Chip, shape: tuple[int, ...]) -> float:
  """Returns how many links a chip of a slice has, on average.

  A dimension of n chips has n - 1 links, or n where it is closed to a ring;
  every link has two ends. `shape` is the slice's size in each dimension.
  """
  total = 0.0
  for size in shape:
    closed = size >= chip.wraps_at and size > 2
    total += 2.0 if closed else 2.0 * (size - 1) / size
  return total
