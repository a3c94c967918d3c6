"""Builds an index of images, or adds to one; goes on where it was stopped."""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator

import numpy as np

from imsvd_jax.base import hashing
from imsvd_jax.base.console import Progress
from imsvd_jax.base.errors import UserError, counted, listing
from imsvd_jax.data import part
from imsvd_jax.data.evaluation_batches import eval_batches
from imsvd_jax.data.source import Source
from imsvd_jax.explain.images import as_shown
from imsvd_jax.interop import image_embeddings
from imsvd_jax.runs.encoder import LoadedEncoder
from imsvd_jax.search import nearest, store
from imsvd_jax.search.build_options import BuildOptions
from imsvd_jax.training import experiment

CHUNK_IMAGES = 2048  # Images that a kill costs at most.
_THUMBNAIL = 64  # Pixels of the longer side.


def build(folder: str, options: BuildOptions) -> list[str]:
  """Adds images to an index; those that are in it already are skipped.

  Args:
    folder: The index; it is made if it is not there.
    options: Which images.

  Returns:
    What was done, line by line.

  Raises:
    UserError: As of `embed`; or the index is damaged, or made by other weights.
  """
  folder = os.path.expanduser(folder)
  nearest.load_faiss()
  encoder, source, paths = image_embeddings.open_images(
    options.workdir,
    options.data,
    split=options.split,
    step=options.step,
    use_target=options.target,
    batch_size=options.batch_size,
    trust_workdir=options.trust_workdir,
  )
  keys, stamps = _identities(source, paths)
  layout = _layout(encoder)
  with store.open_to_append(folder, layout) as writer:
    known = store.Store(folder)
    row_of = store.newest(known.keys)
    # A list may name a file twice.
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    wanted = [
      index
      for key, index in sorted(first.items(), key=lambda item: item[1])
      if key not in row_of or bytes(known.stamps[row_of[key]]) != stamps[index]
    ]
    progress = Progress("Indexing", len(wanted))
    unreadable: list[str] = []
    for start in range(0, len(wanted), CHUNK_IMAGES):
      indices = np.array(wanted[start : start + CHUNK_IMAGES])
      read = read_rows(encoder, source, paths, indices, options.batch_size)
      rows = list(read)
      found = {row["index"] for row in rows}
      unreadable += [source.relative_name(i) for i in indices if i not in found]
      if rows:
        writer.append(_to_append(rows, keys, stamps, row_of, source))
      progress.add(len(indices))
    done = store.Store(folder)
    if not len(done.rows):
      raise UserError(f"None of the images of {source.name} can be read.")
    nearest.write_clusters(done)
  added = len(wanted) - len(unreadable)
  notes = [
    f"{folder}: added {counted(added, 'image')}, skipped"
    f" {len(keys) - len(wanted)} that it has; {len(done.rows)} in all."
  ]
  if unreadable:
    notes.append(
      f"Left out {counted(len(unreadable), 'unreadable image')}:"
      f" {listing(unreadable)}"
    )
  return notes


def _layout(encoder: LoadedEncoder) -> store.Layout:
  images = np.zeros((1, *_image_shape(encoder)), np.uint8)
  num_variables = num_bins = 0
  if encoder.discrete:
    num_variables = encoder.codes(images).shape[1]
    num_bins = experiment.hyperparameters(encoder.config)["num_bins"]
  return store.Layout(
    num_features=encoder.features(images).shape[1],
    num_variables=num_variables,
    num_bins=num_bins,
    encoder=hashing.checksum(encoder.variables),
  )


def _image_shape(encoder: LoadedEncoder) -> tuple[int, int, int]:
  settings = encoder.config.data
  return settings.crop, settings.crop, settings.channels


def _identities(
  source: Source, paths: list[str] | None
) -> tuple[list[bytes], list[bytes]]:
  """Returns what says which image each one is, and which version of it."""
  if paths is None:
    names = [f"{source.name} {i}".encode() for i in range(source.num_examples)]
    version = _digest(source.fingerprint().encode())
    # Another split of the same data has other images of the same numbers.
    return [_digest(version + n) for n in names], [version] * len(names)
  whole = [os.fsencode(os.path.abspath(path)) for path in paths]
  return list(map(_digest, whole)), [_digest(_facts(path)) for path in whole]


def _facts(path: bytes) -> bytes:
  try:
    found = os.stat(path)
  except OSError:
    return b""
  return f"{found.st_size} {found.st_mtime_ns}".encode()


def _digest(content: bytes) -> bytes:
  return hashlib.blake2b(content, digest_size=store.DIGEST).digest()


def read_rows(
  encoder: LoadedEncoder,
  source: Source,
  paths: list[str] | None,
  indices: np.ndarray,
  batch_size: int,
) -> Iterator[dict]:
  """Yields what there is about each readable image of `indices`."""
  settings = encoder.config.data
  batches = eval_batches(
    part.take(source, indices),
    batch_size=min(batch_size, len(indices)),
    resize=settings.resize,
    crop=settings.crop,
  )
  for batch in batches:
    mask = batch["mask"]
    if not mask.any():
      continue
    images = batch["image"][mask]
    vectors, codes = _encoded(encoder, images)
    for row, place in enumerate(batch["index"][mask]):
      index = int(indices[place])
      yield {
        "index": index,
        "vector": vectors[row],
        "code": codes[row],
        "content": _content(images[row], paths[index] if paths else None),
        "thumbnail": _thumbnail(images[row]),
      }


def _encoded(
  encoder: LoadedEncoder, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns features of norm 1, and codes [B, 0] if there are none."""
  if encoder.discrete:
    features, codes = encoder.features_and_codes(images)
  else:
    features = encoder.features(images)
    codes = np.zeros((len(features), 0), np.int32)
  return normalized(features), codes


def normalized(features: np.ndarray) -> np.ndarray:
  """Returns features [B, F] divided by their norms."""
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  if not np.isfinite(norms).all():
    raise UserError("Some features are not finite; check the checkpoint.")
  return features / np.maximum(norms, 1e-12)


def _content(image: np.ndarray, path: str | None) -> bytes:
  """Returns a hash of a file, or of pixels that are in no file of their own."""
  if path is not None:
    # A file that is deleted meanwhile has its pixels still.
    with contextlib.suppress(OSError):
      return content_of_file(path)
  return _digest(np.ascontiguousarray(image).tobytes())


def content_of_file(path: str) -> bytes:
  """Returns the hash of a file's content, as the index has it."""
  with open(path, "rb") as file:
    return _digest(file.read())


def _thumbnail(image: np.ndarray) -> bytes:
  from PIL import Image

  shown = as_shown(image)
  picture = Image.fromarray(shown[..., 0] if shown.shape[-1] == 1 else shown)
  picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
  file = io.BytesIO()
  picture.save(file, "JPEG", quality=80)
  return file.getvalue()


def _to_append(
  rows: list[dict],
  keys: list[bytes],
  stamps: list[bytes],
  row_of: dict[bytes, int],
  source: Source,
) -> store.Rows:
  indices = [row["index"] for row in rows]
  column: Callable[[str], np.ndarray]
  column = lambda name: np.stack([row[name] for row in rows])
  digests = lambda items: np.frombuffer(b"".join(items), np.uint8).reshape(
    -1, store.DIGEST
  )
  return store.Rows(
    vectors=column("vector"),
    codes=column("code"),
    contents=digests([row["content"] for row in rows]),
    keys=digests([keys[i] for i in indices]),
    stamps=digests([stamps[i] for i in indices]),
    names=[os.fsencode(source.relative_name(i)) for i in indices],
    thumbnails=[row["thumbnail"] for row in rows],
    replaced=sum(keys[i] in row_of for i in indices),
  )
