"""The parts of a format of weights: writing a file, and code to load it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.architecture import Architecture
from imsvd_jax.formats.torchvision import to_torchvision


class Weights(NamedTuple):
  """What a format writes.

  Attributes:
    variables: {"params", "batch_stats"}, each with a "backbone".
    architecture: Of the variables.
    projector: Whether to write the projector too.
    classifier: {"kernel": [F, K], "bias": [K]} to write as `fc`.
    num_batches_tracked: torch's counter of training steps.
  """

  variables: Mapping[str, Any]
  architecture: Architecture
  projector: bool
  classifier: Mapping[str, Any] | None
  num_batches_tracked: int

  def to_torchvision(self) -> dict[str, np.ndarray]:
    """Returns torchvision's state dict."""
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
  """What a written file contains, for the code that loads it.

  Attributes:
    file_name: The file's name.
    architecture: What network it has.
    projector: Whether it has the projector.
    num_classes: Size of its classifier; 0 without one.
    mean: Of the images in [0, 1], by channel.
    std: Likewise.
  """

  file_name: str
  architecture: Architecture
  projector: bool = False
  num_classes: int = 0
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()


class Format(NamedTuple):
  """A format of weights.

  Attributes:
    write: Writes (path, weights, metadata).
    loading_code: Returns what a user of the file needs to load it.
    makes_model: Whether that code is Python that makes `model`.
    language: Of the code, for the model card.
    code_suffix: What to append to the file's name to write the code beside the
      file, as other programs read it; not written if empty.
    has_names: Whether the library builds standard networks by their names.
  """

  write: Callable[[str, Weights, Mapping[str, Any]], None]
  loading_code: Callable[[Content], str]
  makes_model: bool = True
  language: str = "python"
  code_suffix: str = ""
  has_names: bool = False
