import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.base import devices as devices_lib
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import probes
from tests.explain import shapes_subject
from tests.explain.table_subject import table_batches, table_subject


@pytest.fixture(scope="module")
def images():
  return shapes_subject.render(np.arange(4), 32)[0]


@pytest.fixture(scope="module")
def keys():
  return jax.random.split(jax.random.key(0), 4)


@pytest.mark.parametrize("name", probes.PROBES)
def test_probes_keep_shape_and_range_and_change_something(name, images, keys):
  out = np.asarray(probes.PROBES[name](keys, images))
  assert out.shape == images.shape
  assert out.dtype == np.float32
  assert out.min() >= -1e-3
  assert out.max() <= 255.001
  assert np.abs(out - images).max() > 1


def test_mirror_channels_and_invert(images, keys):
  np.testing.assert_array_equal(probes.flip(keys, images), images[:, :, ::-1])
  rolled = probes.PROBES["channel roll"](keys, images)
  np.testing.assert_array_equal(rolled[..., 1], images[..., 0])
  inverted = probes.PROBES["invert"](keys, images)
  np.testing.assert_array_equal(inverted, 255.0 - images)


def test_blur_keeps_a_constant_and_the_mean(images, keys):
  constant = np.full((4, 32, 32, 3), 77, np.uint8)
  np.testing.assert_allclose(
    probes.PROBES["blur"](keys, constant), 77, rtol=1e-5
  )


def test_crop_shows_half_the_area(keys):
  ramp = np.broadcast_to(
    np.arange(64, dtype=np.uint8)[None, :, None, None], (4, 64, 64, 1)
  )
  out = np.asarray(probes.crop(keys, ramp))
  # Half the area is 0.71 of the height: so many steps of the ramp remain.
  span = out[:, -2, 5, 0] - out[:, 1, 5, 0]
  np.testing.assert_allclose(span, 61 / np.sqrt(2), atol=0.7)
  assert np.unique(out[:, 0, 5, 0].round(1)).size > 1


def test_occlusion_covers_a_quarter_with_the_mean(images, keys):
  out = np.asarray(probes.occlude(keys, images))
  for one, image in zip(out, images.astype(np.float32), strict=True):
    mean = image.mean((0, 1))
    is_covered = np.abs(one - mean).max(-1) < 1e-3
    rows, columns = np.flatnonzero(is_covered.sum(1) >= 16), is_covered.sum(0)
    assert len(rows) == 16
    assert (columns >= 16).sum() == 16
    left = ~is_covered
    np.testing.assert_array_equal(one[left], image[left])
  assert np.abs(out[0] - out[1]).max() > 1


def test_rotation_turns_about_the_middle(keys):
  y, x = np.mgrid[:41, :41] - 20.0
  # Two ramps: turned, they are ramps in another direction, still at right
  # angles; both directions of turning occur.
  ramps = np.broadcast_to(128 + 2 * np.stack([x, y], -1), (4, 41, 41, 2))
  out = np.asarray(probes.rotate(keys, ramps.astype(np.float32)))
  inside = np.hypot(x, y) < 19
  turned = [
    128 + 2 * np.stack([c * x - s * y, c * y + s * x], -1)
    for c, s in ((np.cos(a), np.sin(a)) for a in (np.pi / 6, -np.pi / 6))
  ]
  sides = [
    [np.abs(one - expected)[inside].max() < 1e-3 for expected in turned]
    for one in out
  ]
  assert all(sum(side) == 1 for side in sides)
  assert len({tuple(side) for side in sides}) == 2


@pytest.fixture(scope="module")
def table():
  rng = np.random.default_rng(0)
  return rng.integers(1, 250, (50, 4, 3, 1)).astype(np.uint8)


def test_edits_against_numpy(table):
  chosen = {
    "nothing": lambda keys, x: x.astype(jnp.float32),
    "mirror": lambda keys, x: x[:, :, ::-1].astype(jnp.float32),
    "noise": lambda keys, x: (
      x.astype(jnp.float32)
      + jax.vmap(lambda k: jax.random.randint(k, (4, 3, 1), 0, 200))(keys)
    ),
  }
  results = {}
  for devices, batch in ((8, 16), (1, 50)):
    results[devices] = probes.measure(
      table_subject(),
      table_batches(table, np.arange(50), batch),
      probes=chosen,
      mesh=devices_lib.make_mesh(jax.devices()[:devices]),
    )
  codes = lambda x: np.asarray(x)[..., 0].astype(np.float32).argmax(-1)
  keys = probes.image_keys(jax.random.key(0), jnp.arange(50), 2)
  for result in results.values():
    assert result.images.tolist() == [50] * 3
    found = dict(zip(result.factors, result.flips, strict=True))
    np.testing.assert_array_equal(found["nothing"], 0)
    for name, images in (
      ("mirror", table[:, :, ::-1]),
      ("noise", chosen["noise"](keys, table)),
    ):
      expected = (codes(images) != codes(table)).mean(0)
      np.testing.assert_allclose(found[name], expected)
  first, second = (result.selectivity for result in results.values())
  assert first == second


def test_edits_need_a_code(images):
  subject = shapes_subject.make_continuous_subject()
  mesh = devices_lib.make_mesh(jax.devices())
  with pytest.raises(UserError, match="discrete code"):
    probes.measure(subject, shapes_subject.batches(8, 8), mesh=mesh)
  with pytest.raises(UserError, match="no images"):
    probes.measure(table_subject(), [], mesh=mesh)


@pytest.mark.parametrize("channels", [1, 3])
def test_edits_of_color_are_for_images_with_color(table, channels):
  names = ("mirror", "grayscale", "channel roll")
  found = probes.measure(
    table_subject(),
    table_batches(table.repeat(channels, axis=-1), np.arange(16), 16),
    probes={name: probes.PROBES[name] for name in names},
    mesh=devices_lib.make_mesh(jax.devices()[:1]),
  )
  assert tuple(found.factors) == (names if channels == 3 else names[:1])


def test_keys_differ_by_image_and_number_only():
  key = jax.random.key(3)
  bits = lambda indices, number: jax.random.key_data(
    probes.image_keys(key, jnp.array(indices), number)
  )
  first = bits([4, 9, 2], 0)
  np.testing.assert_array_equal(bits([9, 4], 0), first[jnp.array([1, 0])])
  everything = np.concatenate([first, bits([4, 9, 2], 1)])
  assert len(np.unique(everything, axis=0)) == 6
