"""Which images a condition on their codes chooses: "v7=3 and not v2=5"."""

import re

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.untrusted import one_line

_MAX_CHARACTERS = 2000
_MAX_DEPTH = 50
_TOKEN = re.compile(r"\s*(?:(v\d{1,6})\s*(!=|=)\s*(\d{1,6})|([()])|(\w+)|(\S))")
_EXPECTED = 'such as "v7=3 and not (v2=5 or v2!=6)"'


def choose(condition: str, codes: np.ndarray, num_bins: int) -> np.ndarray:
  """Returns bool [N]: the images that a condition is true of.

  Args:
    condition: Comparisons of a variable with a bin, v7=3 or v7!=3, joined by
      `and`, `or`, `not` and parentheses; `not` binds most, `or` least.
    codes: [N, M], the bin of each variable.
    num_bins: Of each variable.

  Raises:
    UserError: The condition is not one, or no variable or bin is like that.
  """
  return _Parser(condition, codes, num_bins).parse()


class _Parser:
  """Recursive descent: it compares and combines, and runs nothing."""

  def __init__(self, text: str, codes: np.ndarray, num_bins: int) -> None:
    self._text, self._codes, self._num_bins = text, codes, num_bins
    self._place, self._depth = 0, 0
    if len(text) > _MAX_CHARACTERS:
      raise UserError(
        f"The condition has {len(text)} characters; expected at most"
        f" {_MAX_CHARACTERS}, {_EXPECTED}."
      )

  def parse(self) -> np.ndarray:
    found = self._either()
    if self._next() is not None:
      raise self._wrong("expected `and` or `or`")
    return found

  def _either(self) -> np.ndarray:
    found = self._both()
    while self._took("or"):
      found = found | self._both()
    return found

  def _both(self) -> np.ndarray:
    found = self._one()
    while self._took("and"):
      found = found & self._one()
    return found

  def _one(self) -> np.ndarray:
    self._depth += 1
    if self._depth > _MAX_DEPTH:
      raise self._wrong(f"nested more than {_MAX_DEPTH} deep")
    if self._took("not"):
      found = ~self._one()
    elif self._took("("):
      found = self._either()
      if not self._took(")"):
        raise self._wrong("expected `)`")
    else:
      found = self._comparison()
    self._depth -= 1
    return found

  def _comparison(self) -> np.ndarray:
    token = self._next()
    if token is None or token[1] is None:
      raise self._wrong("expected a comparison such as v7=3")
    variable, is_same, value = token[1][1:], token[2] == "=", int(token[3])
    num_variables = self._codes.shape[1]
    if int(variable) >= num_variables:
      raise UserError(
        f"There is no variable v{variable}; the index has v0 to"
        f" v{num_variables - 1}."
      )
    if value >= self._num_bins:
      raise UserError(
        f"v{variable} has no bin {value}; its bins are 0 to"
        f" {self._num_bins - 1}."
      )
    self._place = token.end()
    return (self._codes[:, int(variable)] == value) == is_same

  def _next(self) -> re.Match[str] | None:
    return _TOKEN.match(self._text, self._place)

  def _took(self, word: str) -> bool:
    token = self._next()
    if token is None or (token[4] or token[5] or "").lower() != word:
      return False
    self._place = token.end()
    return True

  def _wrong(self, what: str) -> UserError:
    rest = one_line(self._text[self._place :].strip(), 40) or "the end"
    return UserError(
      f"The condition is wrong at {rest!r}: {what}; a condition is {_EXPECTED}."
    )
