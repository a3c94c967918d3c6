"""Device augmentation against independent NumPy, colorsys and PIL arithmetic.

Images are small and share jitted functions: compiling is what takes time here.
"""

from __future__ import annotations

import colorsys
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from imsvd_jax.base import pixels
from imsvd_jax.training import augment
from imsvd_jax.training import step as train_step

SIZE = 20
LUMINANCE = np.array([0.299, 0.587, 0.114])


def settings(**overrides) -> SimpleNamespace:
  """A view's settings with everything off."""
  off = {
    "jitter_prob": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "permute_prob": 0.0,
    "invert_prob": 0.0,
    "gray_prob": 0.0,
    "blur_prob": 0.0,
    "blur_sigma": (0.1, 2.0),
    "solarize_prob": 0.0,
    "solarize_threshold": 128,
  }
  return SimpleNamespace(**(off | overrides))


def run(images, view_settings, *, seed=0, keys=None):
  """Augments without normalizing: values in [0, 1]."""
  if keys is None:
    keys = jax.random.split(jax.random.key(seed), len(images))
  function = jax.jit(
    lambda k, x: augment.augment(k, x, view_settings, mean=(0,), std=(1,))
  )
  return np.asarray(function(keys, images))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
  """uint8 [24, SIZE, SIZE, 3], with gray, black, white and saturated pixels."""
  pixels = np.random.default_rng(0).integers(0, 256, (24, SIZE, SIZE, 3))
  pixels[:, 0] = pixels[:, 0, :, :1]  # gray
  pixels[:, 1, :5] = 0
  pixels[:, 1, 5:10] = 255
  pixels[:, 1, 10:] = (255, 0, 128)
  return pixels.astype(np.uint8)


def to_planes(images):
  return jnp.moveaxis(jnp.asarray(images, jnp.float32) / 255, -1, 0)


def from_planes(planes):
  return np.moveaxis(np.asarray(planes), 0, -1)


# --- NumPy references, one float image [H, W, 3] at a time --------------------


def brightness(image, factor):
  return np.clip(image * factor, 0, 1)


def contrast(image, factor):
  mean = (image @ LUMINANCE).mean()
  return np.clip(mean + factor * (image - mean), 0, 1)


def saturation(image, factor):
  gray = (image @ LUMINANCE)[..., None]
  return np.clip(gray + factor * (image - gray), 0, 1)


def hue(image, shift):
  def turn(pixel):
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb((h + shift) % 1, s, v)

  flat = [turn(pixel) for pixel in image.reshape(-1, 3).tolist()]
  return np.array(flat).reshape(image.shape)


def blur(image, sigma, radius):
  """A two-dimensional convolution, pixel by pixel."""
  offsets = np.arange(-radius, radius + 1)
  kernel = np.exp(
    -(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * sigma**2)
  )
  kernel = kernel / kernel.sum()
  padded = np.pad(image, [(radius, radius)] * 2 + [(0, 0)], mode="reflect")
  out = np.zeros_like(image)
  for y, x in itertools.product(range(image.shape[0]), range(image.shape[1])):
    window = padded[y : y + 2 * radius + 1, x : x + 2 * radius + 1]
    out[y, x] = np.einsum("ij,ijc->c", kernel, window)
  return out


# --- Each operation -----------------------------------------------------------


OPERATIONS = {
  "brightness": pixels.adjust_brightness,
  "contrast": pixels.adjust_contrast,
  "hue": pixels.adjust_hue,
  "saturation": lambda planes, factor: pixels.blend(
    planes, factor, with_gray=jnp.ones_like(factor, bool)
  ),
}


@pytest.mark.parametrize(
  ("name", "reference", "factors"),
  [
    ("brightness", brightness, (0.0, 0.6, 1.0, 1.4)),
    ("contrast", contrast, (0.0, 0.6, 1.0, 1.4)),
    ("saturation", saturation, (0.0, 0.6, 1.0, 1.8)),
    ("hue", hue, (-0.5, -0.1, 0.0, 0.3)),
  ],
)
def test_colour_operation_equals_numpy(images, name, reference, factors):
  operation = jax.jit(OPERATIONS[name])
  planes = operation(to_planes(images[:4]), jnp.array(factors))
  expected = [
    reference(image / 255, factor)
    for image, factor in zip(images[:4], factors, strict=True)
  ]
  np.testing.assert_allclose(from_planes(planes), expected, atol=2e-6)


@pytest.mark.parametrize(
  ("name", "enhance"),
  [
    ("brightness", ImageEnhance.Brightness),
    ("contrast", ImageEnhance.Contrast),
    ("saturation", ImageEnhance.Color),
  ],
)
def test_colour_operation_equals_pil(images, name, enhance):
  """PIL rounds to whole levels on the way, so one level of difference."""
  factors = (0.6, 0.9, 1.2, 1.4)
  operation = jax.jit(OPERATIONS[name])
  planes = operation(to_planes(images[:4]), jnp.array(factors))
  expected = [
    np.asarray(enhance(Image.fromarray(image)).enhance(factor))
    for image, factor in zip(images[:4], factors, strict=True)
  ]
  difference = 255 * from_planes(planes) - np.array(expected, np.float64)
  assert np.abs(difference).max() < 2
  assert np.abs(difference).mean() < 0.75


def test_grayscale_equals_pil(images):
  out = run(images, settings(gray_prob=1.0))
  expected = [np.asarray(Image.fromarray(i).convert("L")) for i in images]
  np.testing.assert_allclose(
    255 * out, np.repeat(np.array(expected)[..., None], 3, -1), atol=0.51
  )


@pytest.mark.parametrize("threshold", [0, 100, 128, 255])
def test_solarize_equals_pil(images, threshold):
  view = settings(solarize_prob=1.0, solarize_threshold=threshold)
  out = run(images, view)
  expected = [
    np.asarray(ImageOps.solarize(Image.fromarray(i), threshold)) for i in images
  ]
  np.testing.assert_allclose(255 * out, expected, atol=1e-4)


def test_invert_equals_pil(images):
  out = run(images, settings(invert_prob=1.0))
  expected = [np.asarray(ImageOps.invert(Image.fromarray(i))) for i in images]
  np.testing.assert_allclose(255 * out, expected, atol=1e-4)


def test_blur_equals_numpy(images):
  images = images[:3]
  sigma = (0.1, 0.9, 2.0)
  function = jax.jit(functools.partial(pixels.gaussian_blur, radius=2))
  planes = function(to_planes(images), jnp.array(sigma))
  expected = [blur(i / 255, s, 2) for i, s in zip(images, sigma, strict=True)]
  np.testing.assert_allclose(from_planes(planes), expected, atol=2e-6)


@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
def test_blur_has_the_sigma_that_is_asked_for(size, sigma):
  """The spread of a single bright pixel, in both directions."""
  image = np.zeros((1, size, size, 1), np.uint8)
  image[0, size // 2, size // 2] = 255
  view = settings(blur_prob=1.0, blur_sigma=(sigma, sigma))
  out = run(image, view)[0, :, :, 0].astype(np.float64)
  assert out.sum() == pytest.approx(1, abs=1e-5)
  distance = np.arange(size) - size // 2
  for axis in (0, 1):
    found = np.sqrt((out.sum(1 - axis) * distance**2).sum())
    # Pixels sample a Gaussian: at sigma 0.5 they hold a spread of 0.4637.
    weights = np.exp(-0.5 * (distance / sigma) ** 2)
    exact = np.sqrt((weights * distance**2).sum() / weights.sum())
    assert found == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_blur_of_a_tiny_view_keeps_its_range(images, size):
  view = settings(blur_prob=1.0, blur_sigma=(0.0, 50.0))
  out = run(images[:, :size, :size], view)
  assert np.isfinite(out).all()
  assert out.min() >= 0
  assert out.max() <= 1 + 1e-6


def test_blur_of_sigma_zero_changes_nothing(images):
  view = settings(blur_prob=1.0, blur_sigma=(0.0, 0.0))
  np.testing.assert_allclose(run(images, view), images / 255, atol=1e-6)


def test_permutation_is_one_of_six_and_all_occur(images):
  out = run(np.repeat(images[:1], 240, axis=0), settings(permute_prob=1.0))
  counts = dict.fromkeys(itertools.permutations(range(3)), 0)
  for view in out:
    match = [
      order
      for order in counts
      if np.allclose(view, images[0][..., list(order)] / 255, atol=1e-6)
    ]
    counts[match[0]] += 1
  # 40 expected of each; 15 is more than four standard deviations away.
  assert min(counts.values()) > 15


# --- Random order, factors and coins ------------------------------------------


def test_jitter_applies_four_operations_in_the_drawn_order(images):
  """All 24 orders, each against NumPy, one after the other."""
  names = ("brightness", "contrast", "saturation", "hue")
  references = dict(
    zip(names, (brightness, contrast, saturation, hue), strict=True)
  )
  orders = list(itertools.permutations(names))
  rng = np.random.default_rng(1)
  draws = {name: rng.random(24).astype(np.float32) for name in names}
  for name in names:
    turn = [(order.index(name) + 0.5) / 4 for order in orders]
    draws[f"{name}_turn"] = np.array(turn, np.float32)
  strengths = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
  }
  planes = jax.jit(lambda d, x: augment._jitter(d, x, strengths=strengths))(
    draws, to_planes(images)
  )

  for i, order in enumerate(orders):
    expected = images[i] / 255
    for name in order:
      amount = (2 * draws[name][i] - 1) * strengths[name]
      factor = amount if name == "hue" else 1 + amount
      expected = references[name](expected, factor)
    np.testing.assert_allclose(from_planes(planes)[i], expected, atol=1e-5)


@pytest.mark.parametrize(
  "off", [(), ("hue",), ("contrast",), ("contrast", "hue")]
)
def test_a_gpu_computes_the_same_views(images, monkeypatch, off):
  everything = settings(
    jitter_prob=0.8,
    **dict.fromkeys({"brightness", "contrast", "saturation"} - {*off}, 0.4),
    hue=0.0 if "hue" in off else 0.1,
    gray_prob=0.2,
    blur_prob=0.5,
    solarize_prob=0.1,
  )
  here = run(images, everything)
  monkeypatch.setattr(
    jax.lax, "platform_dependent", lambda *a, cuda, default: cuda(*a)
  )
  np.testing.assert_allclose(run(images, everything), here, atol=2e-6)


def test_orders_and_factors_are_uniform():
  keys = jax.random.split(jax.random.key(0), 4800)
  draws = jax.jit(lambda k: augment._draw(k, 3))(keys)
  names = ("brightness", "contrast", "saturation", "hue")
  turns = np.stack([draws[f"{name}_turn"] for name in names])
  counts = np.unique(np.argsort(turns, axis=0), axis=1, return_counts=True)[1]
  assert len(counts) == 24
  assert counts.min() > 130  # 200 expected, standard deviation 14
  assert counts.max() < 270
  table = np.concatenate([draws[name].reshape(4800, -1) for name in draws], 1)
  assert table.min() >= 0
  assert table.max() < 1
  np.testing.assert_allclose(table.mean(0), 0.5, atol=0.02)
  correlation = np.corrcoef(table.T) - np.eye(table.shape[1])
  assert np.abs(correlation).max() < 0.07


@pytest.mark.parametrize(
  "name", ["jitter", "permute", "invert", "gray", "blur", "solarize"]
)
def test_probability_is_that_of_each_example(images, name):
  """A third of the examples change; the others come out exactly as they were.

  Also: which ones change and how is the same alone, in another order, or in
  another batch.
  """
  view = settings(brightness=0.4, blur_sigma=(1.0, 2.0))
  setattr(view, f"{name}_prob", 1 / 3)
  batch = np.tile(images, (10, 1, 1, 1))
  keys = jax.random.split(jax.random.key(5), 240)
  out = run(batch, view, keys=keys)
  same = np.isclose(out, batch / 255, atol=1e-6).reshape(240, -1).all(1)
  if name == "permute":  # One permutation in six changes nothing.
    assert 40 < (~same).sum() < 96
  else:
    assert 50 < (~same).sum() < 110  # 80 expected, standard deviation 7.3
  reverse = run(batch[::-1], view, keys=keys[::-1])
  np.testing.assert_allclose(reverse[::-1], out, atol=1e-6)


def test_operations_apply_in_the_documented_order(images):
  """invert, gray and solarize do not commute."""
  view = settings(invert_prob=1.0, gray_prob=1.0, solarize_prob=1.0)
  expected = (1 - images / 255) @ LUMINANCE
  # Away from the threshold, where rounding may fall on either side.
  clear = np.abs(expected - 127.5 / 255) > 1e-4
  expected = np.where(expected >= 127.5 / 255, 1 - expected, expected)
  out = run(images, view)
  for channel in range(3):
    np.testing.assert_allclose(
      out[..., channel][clear], expected[clear], atol=2e-6
    )


# --- Keys, channels, normalization, devices -----------------------------------


def test_view_keys_depend_on_epoch_index_and_view_only():
  key = jax.random.key(0)
  make = lambda e, i, v: np.asarray(
    jax.random.key_data(augment.view_keys(key, jnp.array(e), jnp.array(i), v))
  )
  keys = make([0, 0, 1, 1], [4, 5, 4, 5], 0)
  assert len(np.unique(keys, axis=0)) == 4
  np.testing.assert_array_equal(make([1], [5], 0)[0], keys[3])
  assert (make([1], [5], 1)[0] != keys[3]).any()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_channels(images, channels):
  """Contrast about the plain mean applies; saturation, hue, gray do not."""
  pixels = images[..., [c % 3 for c in range(channels)]]
  view = settings(
    jitter_prob=1.0, saturation=0.4, hue=0.1, gray_prob=1.0, contrast=0.4
  )
  keys = jax.random.split(jax.random.key(2), len(pixels))
  out = run(pixels, view, keys=keys)
  factor = 0.6 + 0.8 * augment._draw(keys, channels)["contrast"]
  mean = (pixels / 255).mean((1, 2, 3), keepdims=True)
  factor = np.asarray(factor)[:, None, None, None]
  expected = np.clip(mean + factor * (pixels / 255 - mean), 0, 1)
  np.testing.assert_allclose(out, expected, atol=2e-6)


def test_normalize_and_everything_off(images):
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  expected = (images / 255 - np.array(mean)) / np.array(std)
  out = augment.normalize(jnp.asarray(images), mean=mean, std=std)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)
  keys = jax.random.split(jax.random.key(0), len(images))
  out = augment.augment(keys, images, settings(), mean=mean, std=std)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


def test_what_is_off_is_not_compiled(images):
  def operations(view):
    keys = jax.random.split(jax.random.key(0), len(images))
    function = lambda k, x: augment.augment(k, x, view, mean=(0,), std=(1,))
    return str(jax.make_jaxpr(function)(keys, images))

  everything_off = operations(settings())
  assert "random_bits" not in everything_off
  strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2}
  assert operations(settings(**strengths, hue=0.1)) == everything_off
  assert operations(settings(jitter_prob=0.8)) == everything_off
  # Hue is the only one that takes a floor.
  jitter = settings(jitter_prob=0.8, **strengths)
  assert "floor" not in operations(jitter)
  jitter.hue = 0.1
  assert "floor" in operations(jitter)


def test_eight_devices_give_the_same_views(images):
  view = settings(
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    blur_prob=0.5,
  )
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
  keys = jax.random.split(jax.random.key(0), len(images))
  one = run(images, view, keys=keys)
  eight = run(
    jax.device_put(images, sharding),
    view,
    keys=jax.device_put(keys, sharding),
  )
  np.testing.assert_allclose(one, eight, atol=1e-6)


def test_the_keys_of_the_objective_are_none_of_augmentation():
  """Else the noise of step s would be the colours of epoch s."""
  rng = jax.random.key(0)
  fold = jax.random.fold_in
  numbers = jnp.arange(4)
  views = {
    tuple(jax.random.key_data(key).tolist())
    for view in range(2)
    for key in augment.view_keys(
      rng, jnp.repeat(numbers, 4), jnp.tile(numbers, 4), view
    )
  }
  assert len(views) == 32
  noise = {
    tuple(jax.random.key_data(fold(fold(key, a), b)).tolist())
    for key in (train_step.noise_key(rng, step) for step in range(4))
    for a in range(4)
    for b in range(2)
  }
  assert len(noise) == 32
  assert not views & noise
