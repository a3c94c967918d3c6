"""The error that each precision of the matrix products causes.

Hardware multiplies float32 matrices exactly or in cheaper ways. This measures
the error of the cheaper ways in the loss and in its gradient. A CPU always
multiplies exactly, so it emulates them: it rounds the operands and multiplies
them exactly. Hardware does the same, up to the order of its sums.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imsvd_jax.base.console import print_line
from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks import machine
from imsvd_jax.benchmarks.loss_kernel import Problem, check
from imsvd_jax.benchmarks.text import Findings

Dot = Callable[[jax.Array, jax.Array], jax.Array]

# Scale of the logits at the start of training, midway, and near the optimum,
# where the entries of Pc are counts of images.
SHARPNESS = {"start": 1.0, "midway": 4.0, "end": 16.0}
_MOST_ENTRIES = 16_384  # The float64 reference holds D x D matrices.


@dataclasses.dataclass(frozen=True)
class Error:
  """The errors of one precision in one state of training."""

  precision: str  # Of the products.
  state: str  # A key of SHARPNESS.
  loss: float  # Relative error of the off-diagonal term.
  # Error of its gradient with respect to the logits, as a share of the gradient
  # (both in the Euclidean norm).
  gradient: float
  # The gradient's error if the products take log Pc as it is.
  uncentered: float


def _exact(x: jax.Array, y: jax.Array) -> jax.Array:
  return jax.lax.dot(x, y, precision="highest")


def _bfloat16(x: jax.Array) -> jax.Array:
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _tf32(x: jax.Array) -> jax.Array:
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)


def _three_passes(x: jax.Array, y: jax.Array) -> jax.Array:
  """Takes each operand as a sum of two bfloat16; omits the least product."""
  (x1, x2), (y1, y2) = _halves(x), _halves(y)
  return _exact(x1, y1) + (_exact(x1, y2) + _exact(x2, y1))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  high = _bfloat16(x)
  return high, _bfloat16(x - high)


# Names as in `jax.lax.dot_general`, and how a CPU emulates them.
EMULATED: dict[str, Dot] = {
  "float32": _exact,
  "bfloat16_3x": _three_passes,
  "tensorfloat32": lambda x, y: _exact(_tf32(x), _tf32(y)),
  "bfloat16": lambda x, y: _exact(_bfloat16(x), _bfloat16(y)),
}

_PRESETS = {
  "float32": jax.lax.DotAlgorithmPreset.F32_F32_F32,
  "bfloat16_3x": jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3,
  "tensorfloat32": jax.lax.DotAlgorithmPreset.TF32_TF32_F32,
  "bfloat16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
}


def products(platform: str) -> dict[str, Dot]:
  """Returns the products by precision: a device's own, or a CPU's emulation."""
  if platform == "cpu":
    return EMULATED
  return {
    name: functools.partial(jax.lax.dot, precision=preset)
    for name, preset in _PRESETS.items()
  }


def benchmark(problem: Problem) -> Findings:
  """Measures on this machine; see `measure`."""
  about = machine.describe(machine.devices(1))
  errors = measure(problem)
  return Findings(
    as_text(problem, errors, about), as_dict(problem, errors, about)
  )


def measure(problem: Problem) -> list[Error]:
  """Returns the error of every precision in every state of training.

  Precisions that the device does not support are left out.

  Raises:
    UserError: The problem is too large for its float64 reference.
  """
  check(problem)
  if problem.num_entries > _MOST_ENTRIES:
    raise UserError(
      f"D = {problem.num_entries} is too wide for the float64 reference; choose"
      f" --num_variables and --num_bins for at most {_MOST_ENTRIES}."
    )
  errors = []
  for state, sharpness in SHARPNESS.items():
    logits = _logits(problem, sharpness)
    exact = _reference(logits)
    for name, dot in products(jax.default_backend()).items():
      try:
        error = _error(logits, dot, exact)
      except jax.errors.JaxRuntimeError:
        print_line(f"{name}: not on this device.")
        continue
      errors.append(Error(name, state, *error))
      print_line(f"{state}, {name}: done.")
  return errors


def _error(
  logits: Sequence[np.ndarray], dot: Dot, exact: tuple[float, list[np.ndarray]]
) -> tuple[float, float, float]:
  """Returns an Error's numbers: loss, gradient, uncentered."""
  run = jax.jit(term, static_argnums=(2, 3))
  value, gradients = run(*logits, dot, True)
  _, uncentered = run(*logits, dot, False)
  return (
    abs(float(value) - exact[0]) / abs(exact[0]),
    _distance(gradients, exact[1]),
    _distance(uncentered, exact[1]),
  )


def _reference(logits: Sequence[np.ndarray]) -> tuple[float, list[np.ndarray]]:
  """Returns the term and its gradients in float64, on the CPU."""
  with jax.enable_x64(), jax.default_device(jax.devices("cpu")[0]):
    wide = [np.float64(z) for z in logits]
    value, gradients = jax.jit(term, static_argnums=(2, 3))(
      *wide, jnp.dot, False
    )
    return float(value), [np.asarray(g) for g in gradients]


def _logits(problem: Problem, sharpness: float) -> list[np.ndarray]:
  """Two related views [N, M, b]."""
  rng = np.random.default_rng(0)
  shape = (problem.num_images, problem.num_variables, problem.num_bins)
  draw = lambda: rng.standard_normal(shape, np.float32)
  common = draw()
  return [
    (sharpness * (common + 0.2 * draw())).astype(np.float32) for _ in "12"
  ]


def term(
  z1: jax.Array, z2: jax.Array, dot: Dot, centered: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the off-diagonal term and its gradients by the logits, by hand.

  The arithmetic of objectives/joint_entropy_streamed.py in one tile, with the
  products and the centering to choose. Logits are [N, M, b], `dot` multiplies
  matrices, and products take log Pc + 2 log b if `centered`, else log Pc + 1.
  """
  num_images, num_variables, num_bins = z1.shape
  q1, q2 = (jax.nn.softmax(z) for z in (z1, z2))
  a, b = (q.reshape(num_images, -1) for q in (q1, q2))  # [N, D]
  p = dot(a.T, b) / num_images  # [D, D]
  log_p = jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))
  variable = jnp.arange(a.shape[1], dtype=jnp.int32) // num_bins
  different = variable[:, None] != variable
  scale = 1 / max(num_variables * (num_variables - 1), 1)
  value = scale * jnp.sum(jnp.sum(jnp.where(different, p * log_p, 0), axis=1))
  # The level adds the same to all bins of a variable; the softmax cancels it.
  level = 2 * math.log(num_bins) if centered else 1.0
  slope = jnp.where(different, log_p + level, 0)
  d_q1 = dot(b, slope.T).reshape(q1.shape) * (scale / num_images)
  d_q2 = dot(a, slope).reshape(q2.shape) * (scale / num_images)
  return value, (_through_softmax(q1, d_q1), _through_softmax(q2, d_q2))


def _through_softmax(q: jax.Array, d_q: jax.Array) -> jax.Array:
  return q * (d_q - jnp.sum(q * d_q, axis=-1, keepdims=True))


def _distance(
  gradients: Sequence[jax.Array], exact: Sequence[np.ndarray]
) -> float:
  """Returns |g - exact| / |exact| in the Euclidean norm."""
  square = lambda arrays: sum(np.sum(np.square(a)) for a in arrays)
  apart = [np.float64(g) - e for g, e in zip(gradients, exact, strict=True)]
  return float(np.sqrt(square(apart) / square(exact)))


def as_dict(
  problem: Problem, errors: list[Error], about: dict[str, Any]
) -> dict[str, Any]:
  """Returns everything, for --json."""
  return {
    "benchmark": "precision",
    "machine": about,
    "problem": dataclasses.asdict(problem),
    "emulated": about["platform"] == "cpu",
    "errors": [dataclasses.asdict(error) for error in errors],
  }


def as_text(
  problem: Problem, errors: list[Error], about: dict[str, Any]
) -> str:
  """Returns the report for people."""
  how = "measured on the device"
  if about["platform"] == "cpu":
    how = "emulated by rounding the operands"
  lines = [
    f"Errors of the off-diagonal term by the precision of its products, {how}:"
    f" N = {problem.num_images}, M = {problem.num_variables},"
    f" b = {problem.num_bins}",
    machine.as_text(about),
    "",
    f"{'':10}{'precision':15}{'loss':>10}{'gradient':>10}{'uncentered':>11}",
  ]
  for e in errors:
    lines.append(
      f"{e.state:10}{e.precision:15}{e.loss:10.1e}{e.gradient:10.1e}"
      f"{e.uncentered:11.1e}"
    )
  lines += [
    "",
    "Relative to float64; gradients with respect to the logits. uncentered:"
    " with products of log Pc instead of log Pc + 2 log b.",
  ]
  return "\n".join(lines)
