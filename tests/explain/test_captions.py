"""Names of bins: planted ones are found, chance ones are not."""

import numpy as np

from imsvd_jax.explain import captions
from imsvd_jax.explain.factors import make_factor

N = 4000


def known(seed=0):
  rng = np.random.default_rng(seed)
  shape = rng.integers(0, 4, N)
  size = rng.uniform(0, 1, N)
  names = ("circle", "square", "star", "ring")
  return (
    shape,
    size,
    (
      make_factor("shape", shape, names),
      make_factor("size", size),
    ),
  )


def test_planted_meanings_are_found():
  shape, size, factors = known()
  rng = np.random.default_rng(1)
  codes = np.zeros((N, 3), np.uint8)
  codes[:, 0] = np.where(rng.uniform(size=N) < 0.1, 0, shape)
  codes[:, 1] = size > 0.7
  codes[:, 2] = (shape == 2) & (size < 0.3)
  found = captions.name_bins(codes, 4, factors, np.arange(N))
  texts = {(c.variable, c.bin): c for c in found.confirmed}
  assert found.num_used == 4 + 2 + 2
  assert texts[0, 1].text == "shape square"
  assert texts[0, 1].precision == 1
  assert texts[1, 1].text.startswith("size 0.69")
  both = texts[2, 1].text.split(" and ")
  assert "shape star" in both
  assert any(text.startswith("size 0.000 to 0.3") for text in both)
  assert texts[2, 1].lift > 10
  assert (2, 0) not in texts  # "Not a small star" lifts nothing.
  for c in found.confirmed:
    member = codes[:, c.variable] == c.bin
    assert abs(c.images - member.sum() / 2) < 0.1 * N
  assert found.table().count("\n") == 1 + len(found.confirmed)
  assert f"{len(found.confirmed)} of 8 bins" in found.line()


def test_random_codes_get_no_name():
  _, _, factors = known()
  codes = np.random.default_rng(2).integers(0, 16, (N, 32)).astype(np.uint8)
  found = captions.name_bins(codes, 16, factors, np.arange(N))
  assert found.num_used == 32 * 16
  assert found.confirmed == ()


def test_nothing_known_names_nothing():
  codes = np.zeros((N, 1), np.uint8)
  assert captions.name_bins(codes, 2, (), np.arange(N)).confirmed == ()


def test_pixels_tell_color_texture_size_and_place():
  images = np.full((2, 20, 20, 3), 50, np.uint8)
  images[0, 2:6, 12:16, 0] = 250  # A small red square above right.
  facts = captions.pixel_facts(images)
  assert facts["share of red"][0] > facts["share of blue"][0]
  assert facts["brightness"][0] > facts["brightness"][1]
  assert max(facts["edges"][1], facts["contrast"][1]) < 1e-6
  np.testing.assert_allclose(facts["size of the object"], [0.04, 0], 1e-6)
  np.testing.assert_allclose(facts["x of the object"], [0.7, 0.5], atol=0.01)
  np.testing.assert_allclose(facts["y of the object"], [0.2, 0.5], atol=0.01)
