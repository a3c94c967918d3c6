"""What a command line does with --config, in this process."""

import logging
import pathlib
import re
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from imsvd_jax.base import recipe_files
from imsvd_jax.base.errors import UserError
from imsvd_jax.commands import command_line, shared_flags
from imsvd_jax.evaluation import recipe_comparison

ROOT = pathlib.Path(__file__).parents[2]

# How ml_collections loads a recipe.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)


@pytest.fixture
def parse(monkeypatch):
  """Parses words by a command that has --config alone; gives its config."""

  def parse(*words):
    values = flags.FlagValues()
    argv = ["program", *words]
    monkeypatch.setattr(flags, "FLAGS", values)
    config = config_flags.DEFINE_config_file(
      "config", None, "", flag_values=values, sys_argv=argv
    )
    command_line._parse(argv)
    command_line._check_required(shared_flags.REQUIRED_CONFIG)
    return config.value

  return parse


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
  """A process that was started outside of the checkout."""
  monkeypatch.chdir(tmp_path)
  for name in [n for n in sys.modules if n.partition(".")[0] == "configs"]:
    monkeypatch.delitem(sys.modules, name)
  paths = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]
  monkeypatch.setattr(sys, "path", paths)
  return tmp_path


def test_a_recipe_can_be_used_from_anywhere(elsewhere, parse):
  recipe = f"{ROOT}/configs/digits.py:debug"
  for words in ([f"--config={recipe}"], ["--config", recipe]):
    sys.path[:] = [path for path in sys.path if path != str(ROOT)]
    for name in [n for n in sys.modules if n.partition(".")[0] == "configs"]:
      del sys.modules[name]
    assert parse(*words, "--config.seed=5").seed == 5


def test_comparing_reads_a_recipe_from_anywhere(elsewhere):
  recipe = recipe_comparison.load_recipe(f"{ROOT}/configs/digits.py:debug")
  assert recipe.config.batch_size == 16


def test_a_folder_that_is_no_checkout_is_not_searched(elsewhere):
  recipe = elsewhere / "mine" / "recipe.py"
  recipe.parent.mkdir()
  recipe.write_text("")
  before = list(sys.path)
  assert recipe_files.locate(f"{recipe}:a:b") == (str(recipe), "a:b")
  # Only the recipes of this project, behind everything else.
  assert sys.path == [*before, str(recipe_files.FOLDER.parent)]


def test_what_a_recipe_cannot_import_is_named(elsewhere, parse, capsys):
  recipe = elsewhere / "recipe.py"
  recipe.write_text("from configurations import common\n")
  with pytest.raises(
    UserError, match="cannot be loaded: No module named 'conf"
  ):
    recipe_comparison.load_recipe(str(recipe))
  with pytest.raises(SystemExit):
    parse(f"--config={recipe}")
  said = capsys.readouterr().err
  assert said.startswith("error: The recipe cannot be loaded: No module named")
  assert said.count("\n") == 1


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("x = 1\n", "mine.py: there is no function get_config, which returns"),
    ("get_config = 3\n", "mine.py: there is no function get_config"),
    ("def get_config():\n  return 3\n", "mine.py: get_config returned int;"),
    ("a = 1\nb = = 2\n", "mine.py, line 2: invalid syntax."),
    ("\nx + 1\n", "mine.py, line 2: NameError: name 'x' is not defined"),
    (
      "from configs import digits\ndef get_config():\n"
      "  c = digits.get_config()\n  c.batchsize = 3\n  return c\n",
      "mine.py, line 4: AttributeError: .*batchsize",
    ),
    (
      "def get_config(mode=''):\n  raise ValueError('no such\\nmode')\n",
      "mine.py: no such mode",
    ),
    ("x = int('three')\n", "mine.py, line 1: ValueError: invalid literal"),
    ("def get_config(mode):\n  pass\n", "mine.py: TypeError: get_config()"),
    ("import sys\nsys.exit('gone')\n", "mine.py, line 2: SystemExit: gone"),
  ],
)
def test_a_recipe_that_fails_is_one_line_with_its_place(
  elsewhere, parse, capsys, text, found
):
  recipe = elsewhere / "mine.py"
  recipe.write_text(text)
  with pytest.raises(SystemExit) as stopped:
    parse(f"--config={recipe}")
  assert stopped.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith("error: "), said
  assert re.search(found.replace("()", r"\(\)"), said), said
  assert said.count("\n") == 1
  with pytest.raises(UserError):
    recipe_files.load(str(recipe))


def test_a_recipe_is_a_python_file(elsewhere):
  (elsewhere / "notes.txt").write_text("remember the milk")
  with pytest.raises(UserError, match=r"no recipe; expected a Python file"):
    recipe_files.load("notes.txt")


def test_a_recipe_of_ones_own_needs_no_mode(elsewhere):
  recipe = elsewhere / "mine.py"
  recipe.write_text(
    "from configs import digits\n"
    "def get_config():\n  return digits.get_config()\n"
  )
  found = recipe_comparison.load_recipe("mine.py")
  assert found.name == "mine"
  assert found.config.data.name == "digits"


@pytest.mark.parametrize(
  ("words", "found"),
  [
    ((), "--config is missing. Give it, for example --config=digits."),
    (("--config=",), "No recipe '': found nothing. .* such as digits"),
    (("--config=digit",), "No recipe 'digit': .* Did you mean 'digits'?"),
    (("--config", "--seed"), "No recipe '--seed': found nothing"),
    (("--config=nowhere.py:debug",), "No recipe 'nowhere.py': found nothing"),
    (("--config=.",), r"No recipe '\.': found a folder. Expected a file"),
    (("--config",), "(?i)missing value for flag --config"),
  ],
)
def test_a_missing_recipe_is_one_line(words, found, parse, capsys):
  with pytest.raises(SystemExit) as stopped:
    parse(*words)
  assert stopped.value.code == 2
  said = capsys.readouterr().err
  assert re.search(found, said), said
  assert said.count("\n") == 1


@pytest.mark.parametrize(
  ("path", "expected"),
  [
    ("/x/asyncio/base_events.py", False),
    ("/x/clu/asynclib.py", False),
    ("/x/orbax/checkpoint/handler.py", False),
    ("/x/imsvd_jax/train.py", True),
    ("/x/another/library.py", True),
  ],
)
def test_tracebacks_that_reach_us_as_exceptions_are_not_logged_too(
  path, expected
):
  error = (ValueError, ValueError("full"), None)
  record = logging.LogRecord("", logging.ERROR, path, 1, "text", (), error)
  assert command_line._is_news(record) is expected
  record.exc_info = None
  assert command_line._is_news(record)


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (
      AttributeError(KeyError("'lr'")),
      "Unknown config key 'lr'. `imsvd recipes",
    ),
    (KeyError("nothing"), "Unknown config key 'nothing'. `imsvd recipes"),
    (
      KeyError('\'epoch\'\nDid you mean "epochs" instead of "epoch"?'),
      "Unknown config key 'epoch'. Did you mean 'epochs'? `imsvd recipes",
    ),
    (KeyError("\"'lr'\""), "Unknown config key 'lr'. `imsvd recipes"),
  ],
)
def test_an_unknown_key_is_named(error, message):
  assert command_line._unknown_key(error).startswith(message)
