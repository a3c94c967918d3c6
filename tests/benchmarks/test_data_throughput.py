"""The measurement of the host's pipeline: its numbers, reference and text."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs import cifar10_r18, folder_r18
from imsvd_jax import data
from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks import data_throughput, host_stages, pil_reference
from imsvd_jax.data import boxes, host_pipeline
from tests.data import made_sources
from tests.data.conftest import bad_folder, photo_folder

__all__ = ["bad_folder", "photo_folder"]  # Fixtures of these tests too.
STAGES = ("reading", "decode", "crop", "batching")


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(host_stages, "_WAIT_SECONDS", 0.01)
  monkeypatch.setattr(host_stages, "_ROUNDS", 1)
  monkeypatch.setattr(pil_reference, "_IMAGES", 4)


def config_for(path, **overrides):
  config = folder_r18.get_config("debug")
  config.update_from_flattened_dict(
    {
      "batch_size": 8,
      "data.name": "folder",
      "data.path": str(path),
      "data.num_examples": 0,
      **overrides,
    }
  )
  return config


@pytest.mark.proof
def test_numbers_of_a_folder_with_bad_files(bad_folder):
  text, results = data_throughput.benchmark(
    config_for(bad_folder), seconds=0.01, reference=True
  )
  assert json.loads(json.dumps(results)) == results
  shares = [results[f"share_{stage}"] for stage in STAGES]
  assert sum(shares) == pytest.approx(1)
  assert min(shares) >= 0
  assert results["views_per_second"] == 2 * results["images_per_second"]
  assert results["bad_files"] <= results["bad_images"] < results["images"] + 24
  assert results["bad_files"] > 0
  once = results["pil_views_per_cpu_second"]
  per_view = results["pil_per_view_views_per_cpu_second"]
  assert min(once, per_view) > 0
  # Both ratios have the same numerator.
  assert results["speedup"] * once == pytest.approx(
    results["speedup_per_view"] * per_view
  )
  assert results["augment_ms_per_image"] > 0
  for name in (*(f"share of {s}" for s in STAGES), "bad files", "PIL"):
    assert name in text


@pytest.mark.proof
def test_photographs_take_the_place_of_the_data():
  config = config_for("/nowhere")
  text, results = data_throughput.benchmark(
    config, seconds=0.01, photographs=9, packed=True
  )
  assert "bad files" in text
  packed = results["packed"]
  assert list(packed["PIL"]["times_pil"]) == [1, 1, 1]
  assert packed["pack, raw"]["sent_bytes"] == 256 * 256 * 3
  assert packed["pack, raw"]["disk_bytes"] > 256 * 256 * 3
  assert packed["pack, jpeg"]["disk_bytes"] < 40_000
  assert packed["files"]["sent_bytes"] == 2 * 3 * config.views.view1.size**2
  assert "pack, jpeg" in text
  assert config.data.path == "/nowhere"


def test_mistakes():
  with pytest.raises(UserError, match=r"data\.path is '/nowhere'"):
    data_throughput.benchmark(config_for("/nowhere"), seconds=0.01)
  with pytest.raises(UserError, match="--seconds=0"):
    data_throughput.benchmark(config_for("/nowhere"), seconds=0)


def test_nothing_readable_is_said(tmp_path):
  (tmp_path / "1.jpg").write_bytes(b"nothing")
  with pytest.raises(UserError, match=r"Cannot read image .*1\.jpg"):
    data_throughput.benchmark(config_for(tmp_path), seconds=0.01)


def test_the_reference_makes_the_views_of_the_pipeline(tmp_path):
  data_throughput.write_photographs(str(tmp_path), 4, width=120, height=90)
  settings = made_sources.data_settings("folder", path=str(tmp_path))
  source = data.make_source(settings, "train")
  views = made_sources.views(size=64)
  view_list = boxes.view_crops(views)
  batch = next(
    host_pipeline.train_batches(
      source, views=views, batch_size=4, seed=host_stages.SEED
    )
  )
  work = list(pil_reference.work_of(source, view_list, 4))
  theirs = [
    pil_reference.views_of(*item, view_list, "BICUBIC") for item in work
  ]
  difference = np.abs(batch["views"][0].astype(int) - np.array(theirs))
  assert difference.mean() < 4
  shuffled = np.abs(batch["views"][0][::-1].astype(int) - np.array(theirs))
  assert shuffled.mean() > 10


def test_three_ways_from_memory_to_views():
  config = cifar10_r18.get_config("debug")
  config.update_from_flattened_dict(
    {"data.num_examples": 40, "data.image_size": 20, "batch_size": 8}
  )
  text, results = data_throughput.benchmark(config, seconds=0.01)
  ways = results["paths"]
  numbers = 4 + 4 + 2 * 5 * 4  # Index, epoch, and two boxes of an image.
  size = config.views.view1.size
  assert [way["sent_bytes"] for way in ways.values()] == [
    4 + 4 + 2 * 3 * size**2,
    numbers + 3 * 20**2,
    numbers,
  ]
  for name, way in ways.items():
    assert name in text
    assert min(way.values()) > 0
