"""A loaded encoder as a file for other programs, and the card beside it."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imsvd_jax import __version__, formats
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.base.files import check_output, write_whole
from imsvd_jax.data.source import value_range_of
from imsvd_jax.formats import untrusted
from imsvd_jax.formats.numpy_files import load_arrays
from imsvd_jax.formats.torchvision import as_floats
from imsvd_jax.interop import hub, model_card, onnx_program, stablehlo
from imsvd_jax.runs.encoder import LoadedEncoder, load_encoder

# Programs; the other formats are weights.
PROGRAMS = {
  stablehlo.FORMAT: stablehlo.write_stablehlo,
  onnx_program.FORMAT: onnx_program.write_onnx,
}
# What a model card names as the library of a program.
_LIBRARIES = {stablehlo.FORMAT: "jax", onnx_program.FORMAT: "onnx"}
Classifier = Mapping[str, np.ndarray]


def export_encoder(
  workdir: str,
  format_name: str,
  output: str,
  *,
  step: int | str | None = None,
  use_target: bool = False,
  with_projector: bool = False,
  classifier: Classifier | None = None,
  license_name: str = "",
  absolute_paths: bool = False,
) -> tuple[list[str], str]:
  """Writes an encoder and its model card.

  Args:
    workdir: A run's directory, or a file of weights to convert.
    format_name: A key of `formats.FORMATS`, or of PROGRAMS, or "hub".
    output: The file; an existing one is replaced. For "hub" a folder.
    step: Which checkpoint, or "best"; the newest good one by default.
    use_target: Take the EMA target network's weights.
    with_projector: Write the projector too.
    classifier: {"kernel": [F, K], "bias": [K]} to write as `fc`.
    license_name: Of the weights.
    absolute_paths: Write where the data are on this machine; by default only
      the name of their folder.

  Returns:
    The paths of the files, the weights or the program first; and one line that
    the user should know, or "".

  Raises:
    UserError: The run has no such weights, or the format cannot hold them.
  """
  known = [*formats.FORMATS, *PROGRAMS, hub.FORMAT]
  lookup(dict.fromkeys(known), format_name, "format")
  in_folder = format_name == hub.FORMAT
  if in_folder and with_projector:
    raise UserError(
      "--format=hub writes the backbone alone; leave out --with_projector."
    )
  output = hub.check_folder(output) if in_folder else check_output(output)
  encoder = load_encoder(workdir, step, use_target=use_target)
  if with_projector and not encoder.has_projector:
    raise UserError(f"{workdir} has no projector; leave out --with_projector.")
  metadata = describe(
    encoder,
    model_card.measured(workdir, encoder.variables),
    use_target=use_target,
    license_name=license_name,
    absolute_paths=absolute_paths,
  )
  if in_folder:
    return _write_folder(output, encoder, metadata, classifier)
  if format_name in PROGRAMS:
    return _write_program(
      output, encoder, metadata, format_name, with_projector, classifier
    )
  return _write_file(
    output, encoder, metadata, format_name, with_projector, classifier
  )


def _write_program(
  output: str,
  encoder: LoadedEncoder,
  metadata: Mapping[str, Any],
  format_name: str,
  projector: bool,
  classifier: Classifier | None,
) -> tuple[list[str], str]:
  """Writes a program and its card; returns as `export_encoder`."""
  if classifier is not None:
    raise UserError(
      "A StableHLO or ONNX program ends in features; leave out --classifier."
    )
  write = PROGRAMS[format_name]
  code = write(output, encoder, metadata, projector=projector)
  library = _LIBRARIES[format_name]
  card = _write_card(output, metadata, code, again=False, library=library)
  return [output, card], ""


def _write_file(
  output: str,
  encoder: LoadedEncoder,
  metadata: Mapping[str, Any],
  format_name: str,
  projector: bool,
  classifier: Classifier | None,
) -> tuple[list[str], str]:
  """Writes weights and their card; returns as `export_encoder`."""
  code = _write_weights(
    output, encoder, metadata, format_name, projector, classifier
  )
  files, chosen = [output], formats.FORMATS[format_name]
  if chosen.code_suffix:
    files.append(f"{output}{chosen.code_suffix}")
    write_whole(files[-1], code.encode())
  files.append(_write_card(output, metadata, code, language=chosen.language))
  return files, _note(encoder, format_name)


def _write_card(
  output: str, metadata: Mapping[str, Any], loading: str, **options: Any
) -> str:
  """Writes the card beside a file; returns its path."""
  path = f"{output}.md"
  card = model_card.model_card(
    file_name=os.path.basename(output),
    metadata=metadata,
    loading=loading,
    **options,
  )
  write_whole(path, card.encode())
  return path


def _write_folder(
  folder: str,
  encoder: LoadedEncoder,
  metadata: Mapping[str, Any],
  classifier: Classifier | None,
) -> tuple[list[str], str]:
  """Writes a folder for the Hugging Face Hub; returns as `export_encoder`."""
  os.makedirs(folder, exist_ok=True)
  weights = os.path.join(folder, hub.WEIGHTS)
  code = _write_weights(
    weights, encoder, metadata, "safetensors", False, classifier
  )
  num_classes = 0 if classifier is None else len(classifier["bias"])
  architecture = _architecture(encoder)
  config = hub.write_config(folder, architecture, metadata, num_classes)
  note = hub.upload_hint(folder)
  if config:
    code = hub.loading_code(folder)
  else:
    note = (
      f"timm cannot build {architecture.describe()} from a config.json: the"
      f" model card has the code that loads it. {note}"
    )
  card = os.path.join(folder, hub.CARD)
  text = model_card.model_card(
    file_name=hub.WEIGHTS,
    title=os.path.basename(folder),
    metadata=metadata,
    loading=code,
    library="timm" if config else "imsvd_jax",
  )
  write_whole(card, text.encode())
  return [name for name in (weights, config, card) if name], note


def _architecture(encoder: LoadedEncoder) -> formats.Architecture:
  """Returns the network; a backbone's weights do not show their pooling."""
  return formats.pooled_as(
    formats.architecture_of(encoder.variables),
    encoder.model.backbone.num_features,
  )


def describe(
  encoder: LoadedEncoder,
  measured: Sequence[model_card.Measured],
  *,
  use_target: bool = False,
  license_name: str = "",
  absolute_paths: bool = False,
) -> dict[str, Any]:
  """Returns the metadata of a file: plain values, as JSON has them."""
  config, own = encoder.config.copy_and_resolve_references(), encoder.metadata
  if not absolute_paths:
    _keep_names_only(config)
  data, name = config.data, config.objective.name
  architecture = _architecture(encoder)
  weights = "EMA target network" if use_target else "trained network"
  metadata = {
    "step": encoder.step,
    "config": config.to_dict(),
    "weights": own.get("weights", weights),
    "network": architecture.describe(),
    "num_features": architecture.network().num_features,
    "dtype": config.model.dtype,
    "objective": name,
    # A file from elsewhere may name an objective and no more.
    "hyperparameters": dict(config.objective.get(name) or {}),
    "data": _data_name(data),
    "input_size": data.crop,
    "resize": data.resize,
    "channels": data.channels,
    "interpolation": data.interpolation,
    "mean": list(data.mean),
    "std": list(data.std),
    "value_range": value_range_of(data) or "",
    "program_input": _program_input(encoder),
    "license": " ".join(str(license_name or own.get("license", "")).split()),
    "evaluation": [row._asdict() for row in measured]
    or _stored_rows(own.get("evaluation")),
    "imsvd_jax_version": __version__,
  }
  return json.loads(json.dumps(metadata))  # Tuples become lists.


def _program_input(encoder: LoadedEncoder) -> str:
  """Returns the type, shape and values of what a program takes."""
  dtype = np.dtype(encoder.pixel_type)
  _, *sides = encoder.images_of(0).shape
  text = f"{dtype} [B, {', '.join(map(str, sides))}], any B"
  given = value_range_of(encoder.config.data)
  if given is None:
    return text
  scaled = "the range of the numbers' type as 0 to 255"
  if given != "auto":
    low, high = given
    scaled = f"{low:g} to {high:g} as 0 to 255"
  return f"{text}: {scaled}, not rounded"


def _stored_rows(rows: Any) -> list[Any]:
  """Returns a file's rows of accuracies, if that is what they are."""

  def is_row(row: Any) -> bool:
    fields = set(model_card.Measured._fields)
    # A file of an earlier version has no name of the metric.
    if not isinstance(row, dict) or {*row, "metric"} != fields:
      return False
    if not all(isinstance(row[name], str) for name in ("what", "data")):
      return False
    bounds = row["interval"] or []
    return isinstance(bounds, list) and all(
      isinstance(number, int | float) for number in [row["value"], *bounds]
    )

  return rows if isinstance(rows, list) and all(map(is_row, rows)) else []


def _keep_names_only(config: ConfigDict) -> None:
  """Replaces paths of this machine by the names of their last folders."""
  for settings, key in ((config.data, "path"), (config, "init_from")):
    if settings.get(key):
      settings[key] = os.path.basename(settings[key].rstrip("/"))


def _data_name(settings: ConfigDict) -> str:
  if "name" not in settings:
    return "not stated"
  path = settings.get("path", "") if settings.name == "folder" else ""
  return (
    f"{settings.name} {path}".strip()
    + f", {settings.get('train_split', '')} split"
  )


def _write_weights(
  output: str,
  encoder: LoadedEncoder,
  metadata: Mapping[str, Any],
  format_name: str,
  projector: bool,
  classifier: Classifier | None,
) -> str:
  """Writes weights; returns the code that loads them."""
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
  chosen = formats.FORMATS[format_name]
  code = chosen.loading_code(
    formats.Content(
      os.path.basename(output),
      architecture,
      projector=projector,
      num_classes=num_classes,
      mean=tuple(metadata["mean"]),
      std=tuple(metadata["std"]),
    )
  )
  if chosen.makes_model:
    code += _usage(metadata, projector, num_classes)
  return code


def _usage(
  metadata: Mapping[str, Any], projector: bool, num_classes: int
) -> str:
  """Returns the line that calls the loaded model."""
  result = "scores" if num_classes else "features"
  if projector:
    result += ", embeddings"
  size = metadata["input_size"]
  shape = f"[B, {metadata['channels']}, {size}, {size}]"
  return f"{result} = model(images)  # float32 {shape}, normalized\n"


def _note(encoder: LoadedEncoder, format_name: str) -> str:
  """Returns how a library loads a network that it has no name for."""
  architecture = _architecture(encoder)
  ready_made = formats.is_ready_made(architecture)
  ready_made = ready_made and architecture.stem == "imagenet"
  has_names = formats.FORMATS[format_name].has_names and architecture.is_resnet
  if ready_made or not has_names:
    return ""
  return (
    f"{format_name} has no ready-made {architecture.describe()}, but its class"
    " ResNet loads the file strictly: the model card has the code."
  )


def read_classifier(path: str) -> Classifier | None:
  """Reads {"kernel": [F, K], "bias": [K]} from an .npz file; none if "".

  Raises:
    UserError: The file does not exist or contains something else.
  """
  if not path:
    return None
  path = os.path.expanduser(path)
  if not os.path.isfile(path):
    raise UserError(f"Cannot read {path}: No such file, or not a regular one.")
  with untrusted.reading(path, ".npz file of kernel [F, K] and bias [K]"):
    return {
      name: as_floats(name, value) for name, value in load_arrays(path).items()
    }


def _check_classifier(classifier: Classifier, num_features: int) -> int:
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
    as_floats(f"The classifier's {name}", value)
  return bias[0]
