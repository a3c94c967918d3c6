"""A loaded encoder as a file for other programs, and the card beside it."""

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from imsvd_jax import __version__, formats
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.base.files import check_output, in_place_when_done
from imsvd_jax.interop import model_card, stablehlo
from imsvd_jax.runs.encoder import LoadedEncoder, load_encoder
from imsvd_jax.training import experiment


class Written(NamedTuple):
  """What an export left behind.

  Attributes:
    files: Paths, the weights or the program first.
    note: One line that the user should know; may be empty.
  """

  files: list[str]
  note: str


def export_encoder(
  workdir: str,
  format_name: str,
  output: str,
  *,
  step: int | None = None,
  use_target: bool = False,
  with_projector: bool = False,
  classifier: Mapping[str, np.ndarray] | None = None,
  licence: str = "",
) -> Written:
  """Writes an encoder and its model card.

  Args:
    workdir: A run's directory, or a file of weights to convert.
    format_name: A key of `interop.FORMATS`, or "stablehlo".
    output: The file; an existing one is replaced.
    step: Which checkpoint; the newest good one by default.
    use_target: Take the EMA target network's weights.
    with_projector: Write the projector too.
    classifier: {"kernel": [F, K], "bias": [K]} to write as `fc`.
    licence: Of the weights.

  Returns:
    The files, and what the user should know about them.

  Raises:
    UserError: The run or the format cannot give this file.
  """
  check_format(format_name)
  output = check_output(output)
  encoder = load_encoder(workdir, step, use_target=use_target)
  if with_projector and not encoder.has_projector:
    raise UserError(
      f"{workdir} holds no projector; leave out --with_projector."
    )
  metadata = describe(
    encoder,
    model_card.measured(workdir, encoder.variables),
    use_target=use_target,
    licence=licence,
  )
  write = _write_stablehlo if format_name == "stablehlo" else _write_weights
  written, loading, language = write(
    encoder,
    output,
    format_name,
    metadata=metadata,
    projector=with_projector,
    classifier=classifier,
  )
  card = model_card.model_card(
    file_name=os.path.basename(output),
    metadata=metadata,
    loading=loading,
    language=language,
    again=format_name != "stablehlo",
  )
  _write_text(f"{output}.md", card)
  return Written([*written, f"{output}.md"], _note(encoder, format_name))


def describe(
  encoder: LoadedEncoder,
  measured: Sequence[model_card.Measured],
  *,
  use_target: bool = False,
  licence: str = "",
) -> dict[str, Any]:
  """Returns what a file says about itself: plain values, as JSON has them."""
  config, own = encoder.config, encoder.metadata
  data, name = config.data, config.objective.name
  architecture = formats.architecture_of(encoder.variables)
  weights = "EMA target network" if use_target else "trained network"
  metadata = {
    "step": encoder.step,
    "config": config.to_dict(),
    "weights": own.get("weights", weights),
    "network": architecture.describe(),
    "num_features": architecture.network().num_features,
    "dtype": config.model.dtype,
    "objective": name,
    "hyperparameters": experiment.hyperparameters(config) if name else {},
    "data": _data_name(data),
    "input_size": data.crop,
    "resize": data.resize,
    "channels": data.channels,
    "interpolation": data.interpolation,
    "mean": list(data.mean),
    "std": list(data.std),
    "licence": licence or own.get("licence", ""),
    "evaluation": [row._asdict() for row in measured]
    or own.get("evaluation", []),
    "imsvd_jax_version": __version__,
  }
  return json.loads(json.dumps(metadata))  # Tuples become lists.


def _data_name(settings: Any) -> str:
  if "name" not in settings:
    return "not stated"
  path = settings.get("path", "") if settings.name == "folder" else ""
  return f"{settings.name} {path}".strip() + f", {settings.train_split} split"


def _write_stablehlo(
  encoder, output, format_name, *, metadata, projector, classifier
):
  if classifier is not None:
    raise UserError(
      "A StableHLO program ends in features; leave out --classifier."
    )
  metadata = {**metadata, "format_name": format_name}
  stablehlo.write_stablehlo(output, encoder, metadata, projector=projector)
  name = os.path.basename(output)
  code = stablehlo.loading_code(name, encoder, projector=projector)
  return [output], code, "python"


def _write_weights(
  encoder, output, format_name, *, metadata, projector, classifier
):
  num_classes = 0
  if classifier is not None:
    num_classes = _check_classifier(classifier, metadata["num_features"])
  architecture = formats.write_file(
    output,
    jax.device_get(encoder.variables),
    format_name=format_name,
    metadata=metadata,
    projector=projector,
    classifier=classifier,
  )
  name = os.path.basename(output)
  if format_name == "detectron2":
    config = formats.detectron2_config(
      architecture, name, mean=metadata["mean"], std=metadata["std"]
    )
    _write_text(f"{output}.yaml", config)
    return [output, f"{output}.yaml"], config, "yaml"
  code = formats.loading_code(
    format_name,
    architecture,
    name,
    projector=projector,
    num_classes=num_classes,
  )
  if format_name != "numpy":
    code += _usage(metadata, projector, num_classes)
  return [output], code, "python"


def _write_text(path: str, text: str) -> None:
  with (
    in_place_when_done(path) as unfinished,
    open(unfinished, "w", encoding="utf-8") as file,
  ):
    file.write(text)


def _usage(metadata, projector: bool, num_classes: int) -> str:
  result = "scores" if num_classes else "features"
  if projector:
    result += ", embeddings"
  size = metadata["input_size"]
  shape = f"[B, {metadata['channels']}, {size}, {size}]"
  return f"{result} = model(images)  # float32 {shape}, normalized\n"


def _note(encoder: LoadedEncoder, format_name: str) -> str:
  """Says what a library can do with a network that it has no name for."""
  architecture = formats.architecture_of(encoder.variables)
  ready_made = formats.is_ready_made(architecture)
  ready_made = ready_made and architecture.stem == "imagenet"
  if format_name not in ("torchvision", "timm") or ready_made:
    return ""
  return (
    f"{format_name} has no ready-made {architecture.describe()}, but its class"
    " ResNet loads the file strictly: the model card has the code."
  )


def check_format(format_name: str) -> None:
  """Raises UserError for a format that there is not; lists those there are."""
  known = dict.fromkeys([*formats.FORMATS, "stablehlo"])
  lookup(known, format_name, "format")


def read_classifier(path: str) -> dict[str, np.ndarray]:
  """Reads {"kernel": [F, K], "bias": [K]} from an .npz file.

  Raises:
    UserError: The file is not there or holds something else.
  """
  try:
    with np.load(os.path.expanduser(path), allow_pickle=False) as file:
      return {name: file[name].astype(np.float32) for name in file.files}
  except (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
  ) as error:
    raise UserError(
      f"{path} is not an .npz file of kernel [F, K] and bias [K]"
      f" ({(str(error).splitlines() or [type(error).__name__])[0]})."
    ) from error


def _check_classifier(
  classifier: Mapping[str, np.ndarray], num_features: int
) -> int:
  """Returns the number of classes."""
  shapes = {name: value.shape for name, value in classifier.items()}
  bias = shapes.get("bias", ())
  expected = {"kernel": (num_features, *bias), "bias": bias}
  if len(bias) != 1 or shapes != expected:
    raise UserError(
      f"The classifier has {shapes or 'nothing'}; expected kernel"
      f" [{num_features}, K] and bias [K]."
    )
  for name, value in classifier.items():
    if not np.isfinite(value).all():
      raise UserError(f"The classifier's {name} is not finite.")
  return bias[0]
