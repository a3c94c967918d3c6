"""The page of `imsvd data check`, in a real browser."""

import pathlib

import numpy as np
from PIL import Image

from configs import folder_r18
from imsvd_jax import data
from imsvd_jax.explain import data_page
from tests.explain import chromium

LINES = [
  "Exact duplicates: 1 image repeats another's content:",
  "  train/" + "a_long_name_without_a_space_" * 10 + ".jpg",
  "  '--config.data.mean=(0.1307,)' " + "and more words " * 20,
]


def test_images_of_one_color_are_named(tmp_path):
  for i in range(3):
    Image.new("RGB", (9, 7), (i, 2, 3)).save(tmp_path / f"flat{i}.png")
  noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
  Image.fromarray(noise).save(tmp_path / "noise.png")
  one_pixel = Image.new("RGB", (9, 7))
  one_pixel.putpixel((4, 4), (0, 0, 1))
  one_pixel.save(tmp_path / "nearly.png")
  settings = folder_r18.get_config().data
  settings.path = str(tmp_path)
  lines, found = data_page.report_of(data.make_source(settings, "train"))
  assert found.flat == [f"flat{i}.png" for i in range(3)]
  expected = "Of one color only: 3 images: flat0.png; flat1.png; flat2.png"
  assert [line for line in lines if "one color" in line] == [expected]
  assert "Kinds: PNG RGB 5." in lines


def test_no_line_or_picture_is_wider_than_the_window(tmp_path):
  picture = np.full((40, 2400, 3), 128, np.uint8)
  page = pathlib.Path(data_page.write_page(str(tmp_path), picture, LINES))
  with chromium.Browser() as browser:
    browser.load(page)
    browser.wait("document.querySelector('img').complete")
    for width in (1280, 390):
      browser.resize(width, 800)
      assert browser.value("innerWidth") == width
      assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.text("pre").splitlines()[1] == LINES[1]
