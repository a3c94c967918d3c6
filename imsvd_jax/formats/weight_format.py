"""The parts of a format of weights: writing a file, and code to load it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.architecture import Architecture
from imsvd_jax.formats.torchvision import to_torchvision


class Weights(NamedTuple):
  """What a format writes."""

  # {"params", "batch_stats"}, each with a "backbone".
  variables: Mapping[str, Any]
  architecture: Architecture  # Of the variables.
  projector: bool  # Whether to write the projector too.
  # {"kernel": [F, K], "bias": [K]} to write as its last layer.
  classifier: Mapping[str, Any] | None
  num_batches_tracked: int  # torch's counter of training steps.

  def to_torchvision(self) -> dict[str, np.ndarray]:
    """Returns the state dict; see `torchvision`."""
    return to_torchvision(
      self.variables,
      self.architecture,
      projector=self.projector,
      classifier=self.classifier,
      num_batches_tracked=self.num_batches_tracked,
    )

  def check_backbone_only(self, name: str) -> None:
    """Raises UserError for a projector, which format `name` cannot hold."""
    if self.projector:
      raise UserError(
        f"{name} files hold a backbone alone; export the projector with"
        " --format=torchvision, safetensors or numpy."
      )


class Content(NamedTuple):
  """What a written file contains, for the code that loads it."""

  file_name: str  # The file's name.
  architecture: Architecture  # What network it has.
  projector: bool = False  # Whether it has the projector.
  num_classes: int = 0  # Size of its classifier; 0 without one.
  mean: tuple[float, ...] = ()  # Of the images in [0, 1], by channel.
  std: tuple[float, ...] = ()  # Likewise.


class Format(NamedTuple):
  """A format of weights."""

  # Writes (path, weights, metadata).
  write: Callable[[str, Weights, Mapping[str, Any]], None]
  # Returns what a user of the file needs to load it.
  loading_code: Callable[[Content], str]
  makes_model: bool = True  # Whether that code is Python that makes `model`.
  language: str = "python"  # Of the code, for the model card.
  # What to append to the file's name to write the code beside the file, as
  # other programs read it; not written if empty.
  code_suffix: str = ""
  # Whether the library builds standard networks by their names.
  has_names: bool = False
