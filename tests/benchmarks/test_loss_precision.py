"""`benchmark precision`: the emulated kernel, and the order of its errors."""

import functools
import json

import jax
import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks import loss_kernel, loss_precision, machine
from imsvd_jax.objectives.joint_entropy import joint_entropy_terms

PROBLEM = loss_kernel.Problem(64, num_variables=3, num_bins=8)


@pytest.fixture(scope="module")
def errors():
  return loss_precision.measure(PROBLEM)


def off_diagonal(z1, z2):
  q1, q2 = jax.nn.softmax(z1), jax.nn.softmax(z2)
  return joint_entropy_terms(q1, q2, kernel="streamed")[1]


@pytest.mark.parametrize("centered", [True, False])
def test_it_computes_what_the_kernel_computes(centered):
  logits = loss_precision._logits(PROBLEM, 2.0)
  term = functools.partial(
    loss_precision.term,
    dot=loss_precision.EMULATED["float32"],
    centered=centered,
  )
  value, gradients = jax.jit(term)(*logits)
  expected, slopes = jax.jit(jax.value_and_grad(off_diagonal, argnums=(0, 1)))(
    *logits
  )
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for found, slope in zip(gradients, slopes, strict=True):
    scale = np.max(np.abs(slope))
    np.testing.assert_allclose(found, slope, rtol=0, atol=1e-5 * scale)


def test_fewer_bits_err_more(errors):
  for state in loss_precision.SHARPNESS:
    found = {e.precision: e.gradient for e in errors if e.state == state}
    assert list(found) == list(loss_precision.EMULATED)
    values = list(found.values())
    assert values == sorted(values)
    assert values[0] < 5e-6
    assert 1e-4 < values[-1] < 1e-1
    assert found["bfloat16"] > 4 * found["tensorfloat32"]


def test_centring_helps(errors):
  for error in errors:
    if error.precision != "float32":
      assert error.uncentered > error.gradient


def test_emulated_rounding():
  x = np.float32([1 + 2**-7, 1 + 2**-9, 1 + 2**-12, -3.14159])
  high, low = loss_precision._halves(x)
  np.testing.assert_allclose(high + low, x, rtol=2**-16)
  np.testing.assert_array_equal(loss_precision._tf32(x)[:3], [*x[:2], 1])
  np.testing.assert_array_equal(loss_precision._bfloat16(x)[:3], [x[0], 1, 1])


def test_text_and_json(errors):
  about = machine.describe(jax.devices()[:1])
  figures = loss_precision.as_dict(PROBLEM, errors, about)
  assert json.loads(json.dumps(figures)) == figures
  assert figures["emulated"]
  text = loss_precision.as_text(PROBLEM, errors, about)
  assert "emulated by rounding" in text
  assert text.count("bfloat16_3x") == len(loss_precision.SHARPNESS)


def test_a_problem_too_wide_for_its_reference():
  with pytest.raises(UserError, match="too wide"):
    loss_precision.measure(loss_kernel.Problem(64, 512, 128))


@pytest.mark.gpu
def test_precisions_of_a_gpu():
  problem = loss_kernel.Problem(2048, num_variables=16, num_bins=80)
  errors = {
    e.precision: e.gradient
    for e in loss_precision.measure(problem)
    if e.state == "midway"
  }
  assert errors["float32"] < 1e-5
  assert errors["tensorfloat32"] < 1e-2
