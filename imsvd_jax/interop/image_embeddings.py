"""Features of all images of a folder or of a file of arrays.

They are prepared as in evaluation.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.base.console import Progress
from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import check_output, in_place_when_done
from imsvd_jax.data import make_source, tensorflow_needed
from imsvd_jax.data import source as source_lib
from imsvd_jax.data.evaluation_batches import eval_batches
from imsvd_jax.data.source import Source
from imsvd_jax.runs.encoder import LoadedEncoder, data_settings, load_encoder

_ARRAYS = "arrays="


def find_images(
  folder: str, extensions: Sequence[str]
) -> tuple[list[str], int]:
  """Returns the paths of images below a folder, and the count of other files.

  Paths are relative to the folder, sorted, with "/". Links to folders are
  followed, once each; names that begin with a dot are skipped. `extensions`
  are in lower case. A pipe or a device is another file, whatever its name:
  reading it could wait for ever.
  """
  paths: list[str] = []
  entered: set[str] = set()
  others = 0
  for top, folders, files in os.walk(folder, followlinks=True):
    real = os.path.realpath(top)
    if real in entered:
      folders.clear()
      continue
    entered.add(real)
    folders[:] = [name for name in folders if not name.startswith(".")]
    visible = [name for name in files if not name.startswith(".")]
    images = [
      name
      for name in visible
      if name.lower().endswith(tuple(extensions))
      and _ends(os.path.join(top, name))
    ]
    others += len(visible) - len(images)
    for name in images:
      path = os.path.relpath(os.path.join(top, name), folder)
      paths.append(path.replace(os.sep, "/"))
  return sorted(paths), others


def _ends(path: str) -> bool:
  """Returns whether reading a path ends, if only with an error."""
  return os.path.isfile(path) or not os.path.exists(path)


def write_embeddings(
  output: str, workdir: str, data: str, **options: Any
) -> list[str]:
  """Writes what `embed_folder` returns to an .npz file.

  The file is checked before the work begins.

  Returns:
    What was done, line by line.

  Raises:
    UserError: As from `embed_folder`; or the file cannot be written.
  """
  output = check_output(output)
  arrays = embed_folder(workdir, data, **options)
  with (
    in_place_when_done(output) as unfinished,
    open(unfinished, "wb") as file,  # Given a name, NumPy would append ".npz".
  ):
    np.savez(file, allow_pickle=False, **arrays)
  count, width = arrays["features"].shape
  notes = [f"Wrote {output}: {count} images, {width} features each."]
  unreadable = arrays["unreadable"]
  if len(unreadable):
    shown = ", ".join(unreadable[:5]) + (" ..." if len(unreadable) > 5 else "")
    notes.append(f"Left out {len(unreadable)} unreadable images: {shown}")
  return notes


def embed_folder(
  workdir: str,
  data: str,
  *,
  codes: bool = False,
  step: int | None = None,
  use_target: bool = False,
  batch_size: int = 256,
) -> dict[str, np.ndarray]:
  """Embeds every image below a folder, or the training images of arrays.

  Args:
    workdir: Directory of a run, or a file of weights.
    data: The folder, or "folder=FOLDER" as other commands name data; or
      "arrays=FILE", see `data.sources.arrays`, whose images have numbers for
      paths.
    codes: Whether to return the most probable bin of each variable too.
    step: Which checkpoint; the newest good one by default.
    use_target: Take the EMA target network's weights.
    batch_size: Images that are embedded together.

  Returns:
    "paths" [N], "features" float32 [N, F], with `codes` also "codes" int32
    [N, M], and "unreadable": paths of files that cannot be decoded.

  Raises:
    UserError: There is no image, none can be read, or the run has no codes.
  """
  folder = ""
  paths: list[str] = []
  if not data.startswith(_ARRAYS):
    with tensorflow_needed("A folder"):
      folder, paths = _listed_images(data)
  encoder = load_encoder(
    workdir, step, use_target=use_target, batch_size=batch_size
  )
  if paths:
    source = _folder_source(folder, paths, encoder.config.data)
  else:
    source = _array_source(data, encoder)
    paths = [str(index) for index in range(source.num_examples)]
  if codes:
    encoder.check_discrete()  # Before the first image is read.
  compute = encoder.features_and_codes if codes else encoder.features
  names = ("features", "codes") if codes else ("features",)
  kept, parts = [], []
  for index, pixels in _batches(source, encoder.config.data, batch_size):
    result = compute(pixels)
    parts.append(result if codes else (result,))
    kept.append(index)
  if not kept:
    raise UserError(
      f"None of the {len(paths)} images of {source.name} can be read."
    )
  index = np.concatenate(kept)
  columns = [np.concatenate(part) for part in zip(*parts, strict=True)]
  paths_of_all = np.array(paths)
  return {
    "paths": paths_of_all[index],
    **dict(zip(names, columns, strict=True)),
    "unreadable": np.delete(paths_of_all, index),
  }


def _listed_images(data: str) -> tuple[str, list[str]]:
  """Returns the folder that --data names, and its images."""
  from imsvd_jax.data.sources.folder import EXTENSIONS

  folder = os.path.expanduser(data.removeprefix("folder="))
  if not os.path.isdir(folder):
    what = "is a file" if os.path.exists(folder) else "does not exist"
    raise UserError(
      f"--data={data}: {folder} {what}; expected a folder of images."
    )
  paths, others = find_images(folder, EXTENSIONS)
  if not paths:
    raise UserError(
      f"No images under {folder} ({others} other files); expected files that"
      f" end in {', '.join(EXTENSIONS)}."
    )
  return folder, paths


def _array_source(data: str, encoder: LoadedEncoder) -> Source:
  settings = data_settings(encoder, data)
  source = make_source(settings, "train")
  return dataclasses.replace(source, labels=None, num_classes=0)


def _folder_source(
  folder: str, paths: list[str], settings: ConfigDict
) -> Source:
  import tensorflow as tf

  source_lib.check_encoded_channels(settings)
  files = [os.path.join(folder, path) for path in paths]
  table = tf.constant([os.fsencode(path) for path in files])
  return source_lib.Source(
    name=f"folder:{folder}",
    num_examples=len(files),
    channels=settings.channels,
    interpolation=settings.interpolation,
    max_pixels=source_lib.max_pixels_of(settings),
    fetch=lambda index: tf.io.read_file(table[index]),
    describe=lambda index: files[index],
  )


def _batches(
  source: Source, settings: ConfigDict, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (index [n], uint8 [n, crop, crop, C]) of the readable images.

  The images are prepared exactly as for the evaluation of a run.
  """
  batches = eval_batches(
    source,
    batch_size=min(batch_size, source.num_examples),
    resize=settings.resize,
    crop=settings.crop,
  )
  progress = Progress("Embedding", source.num_examples)
  for batch in batches:
    mask = batch["mask"]
    if mask.any():
      yield batch["index"][mask], batch["image"][mask]
    progress.add(int((batch["index"] >= 0).sum()))  # -1 is padding.
