"""Rows on disk: killed builds lose nothing, hostile ones are refused."""

import contextlib
import json
import os

import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.search import store
from tests.run_command import one_line_error, run_python
from tests.search import store_child


@pytest.fixture
def folder(tmp_path):
  path = str(tmp_path / "index")
  store_child.write(path)
  return path


def test_kills_at_every_write_lose_and_double_nothing(tmp_path):
  result = run_python("-m", "tests.search.store_child", str(tmp_path))
  assert result.returncode == 0, result.stderr
  assert int(result.stdout) > 30  # Kills.


def test_bytes_behind_the_last_row_are_cut_off(folder):
  for name in ("vectors", "names", "names_end"):
    with open(os.path.join(folder, name), "ab") as file:
      file.write(b"rest of a killed build")
  store_child.write(folder)
  store_child.check(folder)
  with store.open_to_append(folder, store_child.LAYOUT) as writer:
    writer.append(store_child.rows(3))
  assert store.Store(folder).name(19) == "x" * 19


def test_the_last_row_of_a_key_counts(folder):
  changed = store_child.rows(1)
  with store.open_to_append(folder, store_child.LAYOUT) as writer:
    writer.append(store.Rows(**{**changed.__dict__, "replaced": 5}))
  found = store.Store(folder)
  assert found.rows.tolist() == [*range(5), *range(10, 20)]


def test_two_builds_and_other_weights_are_refused(folder, tmp_path):
  with (
    store.open_to_append(folder, store_child.LAYOUT),
    one_line_error("Another build writes"),
    store.open_to_append(folder, store_child.LAYOUT),
  ):
    pass
  other = store.Layout(3, 2, 4, "others")
  with one_line_error("other weights"), store.open_to_append(folder, other):
    pass
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "vectors").write_text("a file of the user")
  with (
    one_line_error("is no index and holds vectors"),
    store.open_to_append(str(tmp_path / "photos"), other),
  ):
    pass
  assert (tmp_path / "photos" / "vectors").read_text() == "a file of the user"


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("count", 10**9),
    ("count", -1),
    ("count", True),
    ("count", 1.5),
    ("count", 10**30),
    ("num_features", 10**12),
    ("num_variables", 1000),
    ("num_bins", 2),  # There are codes of 3.
    ("num_bins", 60_000),  # Codes of two bytes.
    ("names", 10**9),
    ("names", 7),
    ("encoder", None),
    ("format", 2),
  ],
)
def test_a_manifest_that_lies_is_refused(folder, key, value):
  path = os.path.join(folder, store.MANIFEST)
  with open(path) as file:
    content = json.load(file)
  with open(path, "w") as file:
    json.dump(content | {key: value}, file)
  with one_line_error("is damaged"):
    store.Store(folder)


def test_what_is_no_index_is_refused(folder, tmp_path):
  with one_line_error("is no index; make one"):
    store.Store(str(tmp_path))
  os.remove(os.path.join(folder, "names"))
  os.mkfifo(os.path.join(folder, "names"))
  with one_line_error("names is no regular file"):
    store.Store(folder)


def test_random_damage_is_one_line_or_harmless(folder):
  rng = np.random.default_rng(0)
  names = sorted(set(os.listdir(folder)) - {"lock"})
  for _ in range(200):
    path = os.path.join(folder, rng.choice(names))
    with open(path, "rb") as file:
      good = file.read()
    bad = bytearray(good)
    bad[rng.integers(len(bad))] = rng.integers(256)
    with open(path, "wb") as file:
      file.write(bad[: rng.integers(len(bad) // 2, len(bad) + 1)])
    with contextlib.suppress(UserError):
      found = store.Store(folder)
      _ = [(found.name(i), found.thumbnail(i)) for i in range(found.count)]
    with open(path, "wb") as file:
      file.write(good)
