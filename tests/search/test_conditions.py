"""Conditions on codes: what they choose, and how they are refused."""

import numpy as np
import pytest

from imsvd_jax.search.conditions import choose
from tests.run_command import one_line_error

CODES = np.random.default_rng(0).integers(0, 4, (200, 3)).astype(np.uint8)
A, B, C = CODES.T


@pytest.mark.parametrize(
  ("condition", "expected"),
  [
    ("v0=3", A == 3),
    (" v0 = 3  AND v1 != 2", (A == 3) & (B != 2)),
    ("v0=1 or v1=2 and v2=3", (A == 1) | ((B == 2) & (C == 3))),
    ("(v0=1 or v1=2) and v2=3", ((A == 1) | (B == 2)) & (C == 3)),
    ("not v0=1 and v1=2", (A != 1) & (B == 2)),
    ("not (v0=1 and not v1=2)", ~((A == 1) & (B != 2))),
    ("not not v2=0", C == 0),
  ],
)
def test_a_condition_chooses(condition, expected):
  np.testing.assert_array_equal(choose(condition, CODES, 4), expected)


@pytest.mark.parametrize(
  ("condition", "message"),
  [
    ("", "expected a comparison"),
    ("v0", "expected a comparison"),
    ("v0=", "expected a comparison"),
    ("v0=1 v1=2", "expected `and` or `or`"),
    ("v0=1 and", "at 'the end'"),
    ("(v0=1", r"expected `\)`"),
    ("v0=1)", "expected `and`"),
    ("v3=1", "no variable v3; the index has v0 to v2"),
    ("v0=4", "v0 has no bin 4; its bins are 0 to 3"),
    ("v0==1", "expected a comparison"),
    ("v0=1\nand\x1b[2J", "expected a comparison"),
    ("__import__('os')", "expected a comparison"),
    ("(" * 60 + "v0=1", "nested more than 50"),
    ("not " * 60 + "v0=1", "nested more than 50"),
    ("v0=1 or " * 1000, "8000 characters"),
  ],
)
def test_a_mistake_is_one_line(condition, message):
  with one_line_error(message):
    choose(condition, CODES, 4)
