"""Barlow Twins, VICReg and SimCLR against the PyTorch library lightly.

Others wrote it, so an error that our formulas share with our own references
would show here. `pip install --no-deps lightly torchvision`, beside torch.

lightly's Barlow Twins has lambda = 0.005, as the paper; ours has 0.0051, as the
paper's code. lightly's NT-Xent has a temperature of 0.5; ours of 0.1, the best
one on ImageNet. Given the same constants, value and gradient are equal.
"""

import importlib.util
import warnings
from unittest import mock

import jax
import numpy as np
import pytest

from imsvd_jax.objectives import barlow_twins_loss, simclr_loss, vicreg_loss

torch = pytest.importorskip("torch")
if importlib.util.find_spec("lightly") is None:
  pytest.skip("needs lightly", allow_module_level=True)

# Torchvision of another build than torch cannot register its operators.
with (
  mock.patch("torch.library.register_fake", return_value=lambda f: f),
  warnings.catch_warnings(action="ignore"),
):
  from lightly import loss as theirs

SAME = {
  "barlow_twins": (
    barlow_twins_loss,
    theirs.BarlowTwinsLoss(lambda_param=0.0051),
  ),
  "vicreg": (vicreg_loss, theirs.VICRegLoss()),
  "simclr": (simclr_loss, theirs.NTXentLoss(temperature=0.1)),
}


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", SAME)
def test_value_and_gradient_are_those_of_lightly(name, scale):
  ours, other = SAME[name]
  rng = np.random.default_rng(0)
  image = rng.normal(size=(64, 32))
  views = [scale * (image + 0.3 * rng.normal(size=(64, 32))) for _ in "12"]

  tensors = [torch.tensor(view, requires_grad=True) for view in views]
  expected = other(*tensors)
  expected.backward()

  value, gradients = jax.value_and_grad(lambda z: ours(*z)[0], has_aux=False)(
    [np.float32(view) for view in views]
  )
  np.testing.assert_allclose(value, expected.item(), 2e-5, 2e-5)
  for gradient, tensor in zip(gradients, tensors, strict=True):
    limit = 2e-5 * float(tensor.grad.abs().max())
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=limit)


def test_their_constants_differ_where_the_docstring_says():
  assert theirs.BarlowTwinsLoss().lambda_param == 0.005
  assert theirs.NTXentLoss().temperature == 0.5
  default = theirs.VICRegLoss()
  names = ("lambda_param", "mu_param", "nu_param", "eps")
  assert [getattr(default, name) for name in names] == [25, 25, 1, 1e-4]
