"""Public figures of TPU chips, and which slices of them exist.

All from the public Cloud TPU documentation (docs.cloud.google.com/tpu/docs/v4,
/v5e, /v5p and /v6e, read in 2025), per chip. The documentation gives the
interconnect in both directions and over all links of a chip; one direction of
one link is what a step can be bounded with. For v4, whose page gives no
interconnect, the figure is that of the TPU v4 paper (arXiv:2304.01433, table
4): 6 links of 50 GB/s.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
  """One kind of chip.

  Attributes:
    name: As in --topology.
    hbm_bytes: Memory capacity, bytes.
    flops: Peak of the matrix units at bfloat16, FLOP/s.
    hbm_bandwidth: Bytes/s.
    link_bandwidth: Bytes/s in one direction of one link to a neighbour.
    dimensions: Of the torus or mesh that slices are cut from.
    wraps_at: Size from which a dimension of a slice is closed to a ring.
    source: Where the figures come from.
  """

  name: str
  hbm_bytes: float
  flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  dimensions: int
  wraps_at: int
  source: str

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
  every link has two ends.

  Args:
    chip: Kind of chip.
    shape: The slice's size in each dimension.
  """
  total = 0.0
  for size in shape:
    closed = size >= chip.wraps_at and size > 2
    total += 2.0 if closed else 2.0 * (size - 1) / size
  return total
