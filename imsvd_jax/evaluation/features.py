"""Features of a data set: one row per image, independent of the batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from imsvd_jax.base import agreement, console, files
from imsvd_jax.base.devices import pad_rows
from imsvd_jax.base.errors import UserError

Embed = Callable[[np.ndarray], jax.Array]


class Features(NamedTuple):
  """The features of N images, ordered by their index in the data set."""

  features: np.ndarray  # float32 [N, F]
  labels: np.ndarray | None  # int32 [N], -1 where unknown; None: unlabelled


def reason_of(error: Exception) -> str:
  """Returns one line that says why a measurement failed."""
  text = " ".join(str(error).split())
  if isinstance(error, UserError | files.Passing):
    return text
  return f"{type(error).__name__}: {text}".removesuffix(": ")


def extract(
  embed: Embed,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  name: str = "features",
) -> Features:
  """Embeds every image of `batches` once.

  With several processes each passes its own share of the images and receives
  the features of all.

  Args:
    embed: From uint8 [B, H, W, C] of this process to float32 [B, F]; or to the
      rows of all processes as one array, sharded over them on axis 0.
    batches: As `data.pipeline.eval_batches` yields them: "image" uint8
      [B, H, W, C], "index" int32 [B], "mask" bool [B] (False: padding) and, if
      labelled, "label" int32 [B].
    name: What the features are of, for the progress line.

  Raises:
    UserError: There are no images, or an image came twice.
  """
  meter = console.Progress(f"Embedding {name}", None)
  rows = []
  with agreement.together():
    for batch, features in embed_ahead(embed, batches):
      rows.append(_unpadded(features, batch))
      meter.add(len(rows[-1][2]))
    if not rows:
      raise UserError(
        f"No images in {name}: expected at least one; check the split and path."
      )
  features, labels, indices = (
    gather_rows(np.concatenate(column)) for column in zip(*rows, strict=True)
  )
  return _ordered(features, labels, indices, name)


def embed_ahead(
  embed: Embed, batches: Iterable[Mapping[str, np.ndarray]]
) -> Iterator[tuple[Mapping[str, np.ndarray], np.ndarray]]:
  """Yields every batch with its features, float32 [B, F], on the host.

  Each batch is dispatched before the previous one's features are fetched, so
  that the device has work while the host reads.
  """
  pending = None
  for batch in batches:
    current = (batch, embed(batch["image"]))
    if pending is not None:
      yield _fetched(*pending)
    pending = current
  if pending is not None:
    yield _fetched(*pending)


def local_rows(rows: jax.Array | np.ndarray) -> np.ndarray:
  """Returns this process's rows of an array that may be everyone's."""
  if not isinstance(rows, jax.Array) or rows.is_fully_addressable:
    return np.asarray(rows)
  # Replicas of a shard start at the same row; one of them is enough.
  shards = {s.index[0].start or 0: s.data for s in rows.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def gather_rows(rows: np.ndarray) -> np.ndarray:
  """Returns the rows [n, ...] of all processes; n may differ among them."""
  if jax.process_count() == 1:
    return rows
  counts = np.ravel(agreement.of_everyone(np.int32(len(rows))))
  everyone = agreement.of_everyone(pad_rows(rows, int(counts.max())))
  return np.concatenate(
    [part[:count] for part, count in zip(everyone, counts, strict=True)]
  )


def in_blocks(
  function: Callable[..., jax.Array], block: int, *arrays: np.ndarray
) -> np.ndarray:
  """Applies a function of blocks of rows [block, ...] to arrays [n, ...].

  Its results [..., block] are joined to [..., n]; it is compiled for one shape.
  """
  count = len(arrays[0])
  block = min(block, count)
  padded = [pad_rows(array, count + -count % block) for array in arrays]
  results = [
    np.asarray(function(*(array[i : i + block] for array in padded)))
    for i in range(0, count, block)
  ]
  return np.concatenate(results, axis=-1)[..., :count]


def _fetched(
  batch: Mapping[str, np.ndarray], embedded: jax.Array
) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
  features = np.asarray(local_rows(embedded), dtype=np.float32)
  if features.ndim != 2 or len(features) != len(batch["image"]):
    raise ValueError(
      f"embed returned shape {features.shape} for {len(batch['image'])} "
      "images; expected [B, F]."
    )
  return batch, features


def _unpadded(
  features: np.ndarray, batch: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the features, labels and indices of a batch without padding."""
  mask = np.asarray(batch["mask"], dtype=bool)
  # -1 means "absent", so that every process gathers the same arrays.
  labels = batch.get("label", np.full(len(mask), -1, np.int32))
  return (
    features[mask],
    np.asarray(labels, dtype=np.int32)[mask],
    np.asarray(batch["index"], dtype=np.int32)[mask],
  )


def _ordered(
  features: np.ndarray, labels: np.ndarray, indices: np.ndarray, name: str
) -> Features:
  order = np.argsort(indices, kind="stable")
  features, labels, indices = features[order], labels[order], indices[order]
  twice = np.flatnonzero(indices[1:] == indices[:-1])
  if twice.size:
    raise UserError(
      f"{name} yields image {indices[twice[0]]} more than once ({twice.size} "
      "repeats); expected each once: give every process its own shard."
    )
  return Features(features, labels if (labels >= 0).any() else None)
