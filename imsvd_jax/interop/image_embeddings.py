"""Features of every image below a folder, prepared as a run evaluates them."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import evaluation_batches
from imsvd_jax.runs.encoder import load_encoder


def find_images(
  folder: str, extensions: Sequence[str]
) -> tuple[list[str], int]:
  """Returns the paths of images below a folder, and how many files are none.

  Args:
    folder: Where to search; links to folders are followed, once each.
    extensions: What names of images end with, in lower case.

  Returns:
    Paths relative to the folder, sorted, with "/"; the number of other files.
    Names that begin with a dot are passed over.
  """
  paths, others, entered = [], 0, set()
  for top, folders, files in os.walk(folder, followlinks=True):
    real = os.path.realpath(top)
    if real in entered:
      folders.clear()
      continue
    entered.add(real)
    folders[:] = [name for name in folders if not name.startswith(".")]
    visible = [name for name in files if not name.startswith(".")]
    images = [n for n in visible if n.lower().endswith(tuple(extensions))]
    others += len(visible) - len(images)
    for name in images:
      path = os.path.relpath(os.path.join(top, name), folder)
      paths.append(path.replace(os.sep, "/"))
  return sorted(paths), others


def embed_folder(
  workdir: str,
  images: str,
  *,
  codes: bool = False,
  step: int | None = None,
  use_target: bool = False,
  batch_size: int = 256,
) -> dict[str, np.ndarray]:
  """Embeds every image below a folder.

  Args:
    workdir: Directory of a run, or a file of weights.
    images: The folder.
    codes: Whether to return the likeliest bin of each variable too.
    step: Which checkpoint; the newest good one by default.
    use_target: Take the EMA target network's weights.
    batch_size: Images that are computed together.

  Returns:
    "paths" [N], "features" float32 [N, F], perhaps "codes" int32 [N, M], and
    "unreadable": paths of files that are not the images they should be.

  Raises:
    UserError: There is no image, or none that can be read, or no code.
  """
  from imsvd_jax.data.sources import folder as folder_lib

  images = os.path.expanduser(images)
  if not os.path.isdir(images):
    what = "is a file" if os.path.exists(images) else "does not exist"
    raise UserError(f"--images={images} {what}; expected a folder of images.")
  paths, others = find_images(images, folder_lib.EXTENSIONS)
  if not paths:
    raise UserError(
      f"No images under {images} ({others} other files); expected files that"
      f" end in {', '.join(folder_lib.EXTENSIONS)}."
    )
  encoder = load_encoder(
    workdir, step, use_target=use_target, batch_size=batch_size
  )
  if codes:
    encoder.check_discrete()  # Before the first image is read.
  compute = encoder.features_and_codes if codes else encoder.features
  names = ("features", "codes") if codes else ("features",)
  kept, parts = [], []
  for index, pixels in _batches(images, paths, encoder.config.data, batch_size):
    result = compute(pixels)
    parts.append(result if codes else (result,))
    kept.append(index)
  if not kept:
    raise UserError(
      f"None of the {len(paths)} images under {images} can be read."
    )
  index = np.concatenate(kept)
  columns = [np.concatenate(part) for part in zip(*parts, strict=True)]
  names_of_files = np.array(paths)
  return {
    "paths": names_of_files[index],
    **dict(zip(names, columns, strict=True)),
    "unreadable": np.delete(names_of_files, index),
  }


def _batches(
  folder: str, paths: list[str], settings: Any, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (index [n], uint8 [n, crop, crop, C]) of the readable images.

  The images are prepared exactly as for the evaluation of a run.
  """
  import tensorflow as tf

  from imsvd_jax.base.console import Progress
  from imsvd_jax.data import source as source_lib

  source_lib.check_encoded_channels(settings)
  files = [os.path.join(folder, path) for path in paths]
  table = tf.constant([os.fsencode(path) for path in files])
  source = source_lib.Source(
    name=f"folder:{folder}",
    num_examples=len(files),
    channels=settings.channels,
    interpolation=settings.interpolation,
    fetch=lambda index: tf.io.read_file(table[index]),
    describe=lambda index: files[index],
  )
  batches = evaluation_batches.eval_batches(
    source,
    batch_size=min(batch_size, len(files)),
    resize=settings.resize,
    crop=settings.crop,
  )
  progress = Progress("Embedding", len(files))
  for batch in batches:
    mask = batch["mask"]
    if mask.any():
      yield batch["index"][mask], batch["image"][mask]
    progress.add(int((batch["index"] >= 0).sum()))  # -1 is padding.
