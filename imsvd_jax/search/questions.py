"""The questions that an index answers: like this, twice, rare, and chosen."""

import dataclasses
import os
from typing import Any

import numpy as np

from imsvd_jax.base import hashing
from imsvd_jax.base.console import Progress
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.base.files import printable
from imsvd_jax.explain import duplicates as duplicates_lib
from imsvd_jax.explain import rarity
from imsvd_jax.interop import image_embeddings
from imsvd_jax.search import build, conditions
from imsvd_jax.search.nearest import Nearest
from imsvd_jax.search.store import Store

_CHUNK = 4096  # Queries at once.
_NEIGHBORS = 16  # Near duplicates of an image that are looked at.
_NUM_RAREST = 5  # Common bins that an answer names.
_SAMPLE = 10_000  # Images by which bins are called rare.


@dataclasses.dataclass(frozen=True)
class Answer:
  """Images, in order, and what is said about each.

  Attributes:
    title: What was asked for.
    rows: Rows of the index.
    columns: Values by name, one for each image.
  """

  title: str
  rows: list[int]
  columns: dict[str, list[Any]]


def query(
  store: Store,
  image: str,
  count: int,
  workdir: str = "",
  step: int | str | None = None,
  use_target: bool = False,
) -> Answer:
  """Returns the images whose features are most like an image's.

  Args:
    store: The index.
    image: The name or the row of an image of the index, or another file.
    count: How many.
    workdir: The run that built the index; for a file only.
    step: Its checkpoint, or "best".
    use_target: Take the EMA target network's weights.

  Returns:
    The images with "cosine" and, where there are codes, in how many variables
    they "agree" with the image asked for, and the "rarest" bins of these.

  Raises:
    UserError: There is no such image, or the weights are other ones.
  """
  row = _row_of(store, image)
  if row is None:
    vector, code = _encode(store, image, workdir, step, use_target)
  else:
    vector, code = store.vectors[row].astype(np.float32), store.codes[row]
  cosines, rows = Nearest(store).search(vector[None], count + 1)
  pairs = [
    (min(float(cosine), 1.0), int(found))
    for cosine, found in zip(cosines[0], rows[0], strict=True)
    if found >= 0 and found != row
  ][:count]
  found_rows = [found for _, found in pairs]
  columns: dict[str, list[Any]] = {"cosine": [round(c, 4) for c, _ in pairs]}
  if store.layout.num_variables:
    alike = np.asarray(store.codes[found_rows]) == code
    columns["agree"] = [f"{n} of {code.size}" for n in alike.sum(axis=1)]
    columns["rarest"] = _rarest(store, code, alike)
  return Answer(f"Nearest to {printable(image)}", found_rows, columns)


def _row_of(store: Store, image: str) -> int | None:
  """Returns the row of an image, None of a file that is not in the index."""
  row = store.find(image)
  path = os.path.expanduser(image)
  if row is None and os.path.isfile(path):
    return _row_of_file(store, path)
  if row is not None or os.path.exists(path):
    return row
  if image.isascii() and image.isdigit():
    if int(image) in set(store.rows.tolist()):
      return int(image)
    raise UserError(
      f"The index has no row {image}; its rows are 0 to {store.count - 1}."
    )
  raise UserError(
    f"{printable(image)} is neither an image of the index nor a file; give a"
    " name as in the index, its row, or the path of a file."
  )


def _row_of_file(store: Store, path: str) -> int | None:
  """Returns the first row with the content of a file."""
  try:
    content = np.frombuffer(build.content_of_file(path), np.uint8)
  except OSError as error:
    raise UserError(
      f"Cannot read {printable(path)}: {error.strerror}."
    ) from None
  same = (store.contents == content).all(axis=1)
  rows = store.rows[same[store.rows]]
  return int(rows[0]) if len(rows) else None


def _encode(
  store: Store,
  image: str,
  workdir: str,
  step: int | str | None,
  use_target: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the features and the codes of a file."""
  if not workdir:
    raise UserError(
      f"{printable(image)} is not in the index; give --workdir, the run that"
      " the index was built with, to compute its features."
    )
  try:
    encoder, source, paths = image_embeddings.open_images(
      workdir, image, step=step, use_target=use_target
    )
  except UserError as error:
    if "--data" not in str(error):
      raise
    raise UserError(f"{printable(image)} is no file of an image.") from None
  if hashing.checksum(encoder.variables) != store.layout.encoder:
    raise UserError(
      f"{workdir} at step {encoder.step} has other weights than those that"
      " built the index; give the --workdir and --step of the build."
    )
  for row in build.read_rows(encoder, source, paths, np.arange(1), 1):
    return row["vector"], row["code"]
  raise UserError(f"{printable(image)} cannot be read as an image.")


def _rarest(store: Store, code: np.ndarray, alike: np.ndarray) -> list[str]:
  """Returns the rarest bins of `code` [M] where `alike` [k, M] is true.

  A bin that few images of the index have says more than one that most have.
  """
  rows = store.rows[:: max(1, len(store.rows) // _SAMPLE)]
  share = (np.asarray(store.codes[rows]) == code).mean(axis=0)
  order = np.argsort(share, kind="stable")
  return [
    " ".join(f"v{m}={code[m]}" for m in order[of[order]][:_NUM_RAREST])
    for of in alike
  ]


def duplicates(store: Store, threshold: float) -> Answer:
  """Returns groups of images that repeat their first one.

  Args:
    store: The index.
    threshold: Images whose features have at least this cosine are near
      duplicates; above 1: only those of the same content.

  Returns:
    The images of all groups, with "group", "kind" (first; exact: the content
    of an earlier one; near) and the "cosine" with the first one.
  """
  first_of = _first_of(store, threshold)
  groups: dict[int, list[int]] = {}
  for row in store.rows.tolist():
    groups.setdefault(first_of[row], []).append(row)
  rows: list[int] = []
  columns: dict[str, list[Any]] = {"group": [], "kind": [], "cosine": []}
  repeated = (members for members in groups.values() if len(members) > 1)
  for number, members in enumerate(repeated):
    vectors = store.vectors[members].astype(np.float32)
    rows += members
    columns["group"] += [number] * len(members)
    contents = [bytes(store.contents[row]) for row in members]
    columns["kind"] += ["first"] + [
      "exact" if content in contents[:i] else "near"
      for i, content in enumerate(contents[1:], start=1)
    ]
    # In float16 a vector's norm is not quite 1.
    vectors = build.normalized(vectors)
    cosines = np.minimum(vectors @ vectors[0], 1.0)
    columns["cosine"] += [round(float(cosine), 4) for cosine in cosines]
  return Answer("Duplicates", rows, columns)


def _first_of(store: Store, threshold: float) -> dict[int, int]:
  """Returns the first image of the group of each row."""
  firsts: dict[bytes, int] = {}
  content_of = {
    row: firsts.setdefault(bytes(store.contents[row]), row)
    for row in store.rows.tolist()
  }
  if threshold > 1:
    return content_of
  near = duplicates_lib.first_of(
    (content_of[left], content_of[right])
    for left, right in _near_pairs(store, threshold)
  )
  return {row: near.get(c, c) for row, c in content_of.items()}


def _near_pairs(store: Store, threshold: float) -> list[tuple[int, int]]:
  """Returns pairs of rows of at least this cosine."""
  neighbors = Nearest(store)
  count = min(_NEIGHBORS, len(store.rows))
  progress = Progress("Comparing", len(store.rows))
  pairs = []
  for start in range(0, len(store.rows), _CHUNK):
    rows = store.rows[start : start + _CHUNK]
    cosines, found = neighbors.search(store.vectors[rows], count)
    for i, j in np.argwhere((cosines >= threshold) & (found >= 0)):
      pairs.append((int(rows[i]), int(found[i, j])))
    progress.add(len(rows))
  return pairs


def outliers(store: Store, count: int, by: str) -> Answer:
  """Returns the images of the rarest codes, the rarest first.

  Args:
    store: The index.
    count: How many.
    by: A name in `rarity.RARITY`.

  Raises:
    UserError: There are no codes.
  """
  store.check_codes()
  measure = lookup(rarity.RARITY, by, "measure of rarity")
  surprise = measure(np.asarray(store.codes[store.rows]), store.layout.num_bins)
  order = np.argsort(-surprise, kind="stable")[:count]
  values = [round(float(surprise[i]), 3) for i in order]
  return Answer(
    f"Outliers by {by}", store.rows[order].tolist(), {"nats": values}
  )


def chosen(store: Store, condition: str) -> Answer:
  """Returns the images whose codes a condition is true of; see `conditions`.

  Raises:
    UserError: There are no codes, or the condition is wrong.
  """
  store.check_codes()
  is_chosen = conditions.choose(condition, store.codes, store.layout.num_bins)
  rows = store.rows[is_chosen[store.rows]].tolist()
  return Answer(f"Images of {condition}", rows, {})
