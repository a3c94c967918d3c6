"""Options of `imsvd pack`: each field is a flag of the command."""

import dataclasses

from imsvd_jax.base.options import option
from imsvd_jax.data.pack_files import ENCODINGS


@dataclasses.dataclass(frozen=True)
class PackOptions:
  """How squares are stored."""

  size: int = option(256, "Side of the squares, in pixels.", lower_bound=1)
  format: str = option(
    "jpeg",
    "jpeg takes a tenth of the disk, raw a quarter of the host's time.",
    choices=ENCODINGS,
  )
  quality: int = option(90, "Of JPEG, 1 to 100.", lower_bound=1)
