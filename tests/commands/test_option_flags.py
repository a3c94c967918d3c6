"""Flags that are made from the fields of a dataclass."""

import dataclasses

import pytest
from absl import flags

from imsvd_jax.base.errors import UserError
from imsvd_jax.base.options import option
from imsvd_jax.commands import option_flags


@dataclasses.dataclass(frozen=True)
class Options:
  workdir: str = option("", "Directory of a run.")
  step: int | None = option(None, "Which checkpoint.", lower_bound=0)
  share: float = option(0.5, "A share.")
  target: bool = option(False, "Whether.")
  split: str = option("train", "Which split.", choices=["train", "eval"])
  protocol: tuple[str, ...] = option(("knn", "linear"), "Protocols.")
  set: tuple[str, ...] = option((), "Settings.", repeated=True)
  variables: tuple[int, ...] | None = option(None, "Numbers.")


def parse(*words):
  values = flags.FlagValues()
  parsed = option_flags.define_flags(Options, values)
  values(["program", *words])
  return parsed()


def test_without_flags_the_options_are_the_defaults():
  assert parse() == Options()


def test_every_kind_of_flag_has_the_type_of_its_field():
  words = ["--workdir=w", "--step=3", "--share=1", "--target", "--split=eval"]
  words += ["--protocol=a,b", "--set=x=1,2", "--set=y=3", "--variables=3,7"]
  assert parse(*words) == Options(
    workdir="w",
    step=3,
    share=1.0,
    target=True,
    split="eval",
    protocol=("a", "b"),
    set=("x=1,2", "y=3"),
    variables=(3, 7),
  )


@pytest.mark.parametrize(
  ("word", "message"),
  [
    ("--step=-1", "non-negative"),
    ("--step=x", "step"),
    ("--split=test", "<train|eval>"),
    ("--share=x", "share"),
  ],
)
def test_a_value_that_does_not_fit_is_refused(word, message):
  with pytest.raises(flags.IllegalFlagValueError, match=message):
    parse(word)


def test_numbers_that_are_none_are_one_clear_line():
  with pytest.raises(UserError, match="--variables=3,x; expected whole numb"):
    parse("--variables=3,x")
