"""Convolutions: each way to compute one gives JAX's numbers."""

import functools

import jax
import numpy as np
import pytest

from imsvd_jax.models import convolution
from imsvd_jax.models.convolution import convolve

LAYOUT = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def draw(x, kernel):
  """An input and a kernel of these shapes."""
  keys = jax.random.split(jax.random.key(0))
  return jax.random.normal(keys[0], x), jax.random.normal(keys[1], kernel)


def windows(size, stride):
  """Strides and padding of a network's layer."""
  low = (size - 1) // 2
  return (stride, stride), ((low, low), (low, low))


def bind(convolve, size, stride):
  return lambda x, kernel: convolve(x, kernel, *windows(size, stride), **LAYOUT)


def assert_equal_to_jax(x, kernel, stride, atol):
  """Outputs and both gradients."""
  found, expected = (
    outputs_and_gradients(bind(way, len(kernel), stride), x, kernel)
    for way in (convolve, jax.lax.conv_general_dilated)
  )
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=atol)
  jax.tree.map(close, found, expected)


def outputs_and_gradients(bound, x, kernel):
  y, transpose = jax.vjp(bound, x, kernel)
  return y, transpose(jax.random.normal(jax.random.key(1), y.shape))


def program(size, stride, x, kernel):
  return str(jax.make_jaxpr(bind(convolve, size, stride))(x, kernel))


@pytest.mark.parametrize(
  ("height", "width", "size", "stride", "product"),
  [
    (2, 2, 3, 1, True),
    (2, 2, 3, 2, True),
    (1, 1, 3, 1, True),
    (1, 3, 3, 2, True),
    (4, 1, 5, 2, True),
    (2, 2, 7, 2, True),
    (2, 2, 1, 2, False),
    (3, 3, 3, 1, False),
  ],
)
def test_the_smallest_maps_are_convolved_by_one_product(
  height, width, size, stride, product
):
  x, kernel = draw((3, height, width, 4), (size, size, 4, 5))
  assert_equal_to_jax(x, kernel, stride, atol=2e-5)
  found = program(size, stride, x, kernel)
  assert ("conv_general_dilated" not in found) == product


@pytest.fixture
def as_on_a_gpu(monkeypatch):
  monkeypatch.setattr(
    jax.lax, "platform_dependent", lambda *a, cuda, default: cuda(*a)
  )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gpu_convolves_neighbors_in_the_stem(as_on_a_gpu, channels):
  x, kernel = draw((2, 12, 8, channels), (7, 7, channels, 5))
  assert_equal_to_jax(x, kernel, stride=2, atol=5e-5)


@pytest.fixture
def as_on_one_device(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize(
  ("height", "width", "size", "stride"),
  [(5, 5, 3, 1), (5, 4, 3, 2), (8, 7, 5, 2), (9, 6, 4, 1), (12, 8, 7, 2)],
)
@pytest.mark.parametrize("images_per_block", [0, 1, 4, 99])
def test_a_cpu_sums_the_kernels_gradient_in_blocks(
  monkeypatch, as_on_one_device, height, width, size, stride, images_per_block
):
  x, kernel = draw((6, height, width, 2), (size, size, 2, 3))
  y = bind(convolve, size, stride)(x, kernel)
  window = 4 * y.shape[1] * y.shape[2] * size * size * 2
  monkeypatch.setattr(convolution, "_BLOCK_BYTES", images_per_block * window)
  assert_equal_to_jax(x, kernel, stride, atol=1e-4)


def test_blocks_are_for_one_device_and_few_filters(monkeypatch):
  blocks = lambda filters: (
    "custom_vjp" in program(3, 1, *draw((2, 6, 6, 2), (3, 3, 2, filters)))
  )
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert blocks(8)
  assert not blocks(256)
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  assert not blocks(8)


def test_a_block_holds_as_much_as_the_cache(monkeypatch, as_on_one_device):
  x, kernel = draw((12, 5, 5, 2), (3, 3, 2, 3))
  gradient = convolve(x, kernel, *windows(3, 1), **LAYOUT)
  # A window is 9 positions of 2 channels, and each image has 25 windows.
  monkeypatch.setattr(convolution, "_BLOCK_BYTES", 5 * 25 * 9 * 2 * 4)
  found = jax.make_jaxpr(
    lambda *a: convolution.kernel_gradient_in_blocks(*a, *windows(3, 1))
  )(x, kernel, gradient)
  assert "f32[100,18]" in str(found)  # 4 images: 5 do not divide 12.


def of_channels(way, channels):
  strides, padding = windows(7, 1)
  return lambda x, kernel: way(
    x, kernel, strides, padding, feature_group_count=channels, **LAYOUT
  )


@pytest.mark.parametrize(
  ("batch", "height", "width"),
  [(6, 14, 9), (8, 5, 7), (12, 3, 3), (7, 1, 2), (11, 1, 1)],
)
def test_a_cpu_convolves_channels_by_shifts(
  monkeypatch, as_on_one_device, batch, height, width
):
  monkeypatch.setattr(convolution, "_LEAST_VALUES", 0)
  x, kernel = draw((batch, height, width, 3), (7, 7, 1, 3))
  found, expected = (
    outputs_and_gradients(of_channels(way, 3), x, kernel)
    for way in (convolution.convolve_channels, jax.lax.conv_general_dilated)
  )
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
  jax.tree.map(close, found, expected)


def test_shifts_of_bfloat16_are_summed_in_float32():
  x, kernel = draw((64, 12, 12, 3), (7, 7, 1, 3))
  half = jax.tree.map(lambda a: a.astype("bfloat16"), (x, kernel))
  exact = jax.tree.map(lambda a: a.astype("float32"), half)

  def gradients(x, kernel):
    y, transpose = jax.vjp(convolution._sum_of_shifts, x, kernel)
    return y, transpose(jax.numpy.ones_like(y))

  found, expected = gradients(*half), gradients(*exact)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert a.dtype == "bfloat16"
    # A rounding to 8 bits, of the sum alone.
    np.testing.assert_allclose(a.astype("float32"), b, rtol=2**-8, atol=1e-2)


def test_shifts_are_for_one_device_and_many_small_maps(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 1)

  def has_shifts(batch, side):
    convolve = of_channels(convolution.convolve_channels, 24)
    x, kernel = draw((batch, side, side, 24), (7, 7, 1, 24))
    return "_sum_of_shifts" in str(jax.make_jaxpr(convolve)(x, kernel))

  assert has_shifts(512, 10)
  assert not has_shifts(2, 10)
  assert not has_shifts(512, 20)
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  assert not has_shifts(512, 10)
