"""The page of `imsvd data check`, in a real browser."""

import pathlib

import numpy as np

from imsvd_jax.explain import data_page
from tests.explain import chromium

LINES = [
  "Exact duplicates: 1 images repeat another's content:",
  "  train/" + "a_long_name_without_a_space_" * 10 + ".jpg",
  "  '--config.data.mean=(0.1307,)' " + "and more words " * 20,
]


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
