"""Every objective against its float64 reference, on many random inputs."""

import pytest

from imsvd_jax.objectives import OBJECTIVES
from tests.objectives import oracle


@pytest.mark.proof
@pytest.mark.parametrize("size", oracle.SIZES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_equal_the_reference(name, size):
  found = oracle.worst(name, size)
  assert found.value < 1e-5
  assert found.gradient < 3e-4
