"""gs:// without Google: each bucket is a folder, and Google's rules hold."""

import os
import pathlib

import clu.metric_writers
import tensorflow as tf
from etils.epath import backend
from orbax.checkpoint._src.path import gcs_utils

from imsvd_jax.base import files as workdirs


class _Files:
  """Stands in for tf.io.gfile."""

  def __init__(self, root: pathlib.Path):
    self._root = root

  def local(self, path: str | os.PathLike) -> str:
    return os.fspath(path).replace("gs://", f"{self._root}/", 1)

  def store(self, path: str) -> dict[str, str]:
    """What TensorStore writes to: a file, or else a folder of many."""
    slash = "" if path.endswith("/_sharding") else "/"
    return {"driver": "file", "path": self.local(path) + slash}

  def GFile(self, path, mode):
    assert "a" not in mode, "nothing can be appended to an object"
    path = pathlib.Path(self.local(path))
    if "w" in mode:
      path.parent.mkdir(parents=True, exist_ok=True)
    return tf.io.gfile.GFile(str(path), mode)

  def __getattr__(self, name):
    function = getattr(tf.io.gfile, name)

    def call(*paths, **options):
      found = function(*map(self.local, paths), **options)
      if name != "glob":
        return found
      return [path.replace(f"{self._root}/", "gs://", 1) for path in found]

    return call


def install(monkeypatch, root: pathlib.Path) -> None:
  """Makes gs://NAME/... stand for files in root/NAME."""
  root.mkdir()
  files = _Files(root)
  monkeypatch.setattr(backend._TfBackend, "gfile", files)
  monkeypatch.setattr(workdirs, "_has_cloud_storage", lambda: True)
  monkeypatch.setattr(
    gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False
  )
  monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", files.store)
  writer = clu.metric_writers.SummaryWriter
  monkeypatch.setattr(
    clu.metric_writers,
    "SummaryWriter",
    lambda folder: writer(files.local(folder)),
  )
