"""`imsvd`, its list of commands, and the --help of each."""

import tomllib

import pytest

import imsvd_jax
from imsvd_jax.__main__ import COMMANDS
from tests.run_command import ROOT, check_refused, run_imsvd, run_python


@pytest.mark.parametrize("words", [(), ("--help",), ("help",)])
def test_alone_it_lists_the_commands_in_one_line_each(words):
  result = run_imsvd(*words)
  assert result.returncode == 0
  for name, command in COMMANDS.items():
    assert f"\n  {name.ljust(16)}{command.about}\n" in result.stdout


def test_it_says_its_version():
  said = run_imsvd("--version").stdout
  assert said == f"imsvd_jax {imsvd_jax.__version__}\n"


def test_every_command_is_listed():
  files = (ROOT / "imsvd_jax" / "commands").glob("*.py")
  commands = {f.stem for f in files if "def run() ->" in f.read_text()}
  assert commands == {*COMMANDS} - {"train"}


HELP = """
import runpy, sys, time
try:
  runpy.run_module("imsvd_jax", run_name="__main__")
finally:
  heavy = {"jax", "tensorflow", "orbax", "sklearn"} & set(sys.modules)
  fast = time.process_time() < 1
  print(heavy or "light", fast, file=sys.stderr)
"""


LISTS = {"benchmark", "data", "search"}  # They have commands of their own.


@pytest.mark.parametrize("name", sorted({*COMMANDS} - LISTS))
def test_help_is_light_and_shows_the_flags_once(name):
  result = run_python("-c", HELP, name, "--help")
  assert result.returncode == 0
  assert result.stderr == "light True\n"
  about, _, flags = result.stdout.partition("\n\nFlags:\n")
  assert "imsvd" in about
  names = [
    line.split()[0] for line in flags.splitlines() if line.startswith("  --")
  ]
  assert name == "recipes" or {"--workdir", "--config"} & set(names)
  assert len(names) == len(set(names))
  assert "--alsologtostderr" not in names
  assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
  "words",
  [
    *((name,) for name in sorted({*COMMANDS} - LISTS)),
    ("benchmark", "step"),
    ("data", "check"),
    ("search", "build"),
  ],
)
def test_an_unknown_flag_is_refused_alike(words):
  result = run_imsvd(*words, "--qqqq=1")
  check_refused(result, "Unknown flag --qqqq. ")
  assert result.stderr.endswith(" --help lists the flags.\n")
  is_recipe = "\n  --config " in run_imsvd(*words, "--help").stdout
  assert ("--config.KEY=VALUE." in result.stderr) == is_recipe


def test_the_help_of_train():
  text = run_imsvd("train", "--help").stdout
  assert text == run_python("-m", "imsvd_jax.main", "--help").stdout
  assert "--config.batch_size=256" in text
  for words in ("Required.", "Default: 300.0.", "runs/NAME-MODE"):
    assert words in text


def test_dashes_and_underscores_are_the_same():
  underscores = run_imsvd("import_weights", "--help")
  assert run_imsvd("import-weights", "--help").stdout == underscores.stdout


@pytest.mark.parametrize(
  ("words", "said"),
  [
    (("trian",), "Unknown command 'trian'. Did you mean 'train'? Known: "),
    (("import",), "Unknown command 'import'. Did you mean 'import_weights'?"),
    (("--config=x",), "Unknown command '--config=x'. Known: train, "),
    (("embed",), "--workdir is missing. Give it, for example --workdir=runs/"),
    (("embed", "--step=a"), "--step=a: expected a non-negative integer or"),
    (("embed", "--batch-size=0"), "--batch_size=0: expected a positive int"),
    (("embed", "--codes=maybe"), "--codes=maybe: expected true or false."),
    (("embed", "--stpe=1"), "Unknown flag --stpe. Did you mean 'step'?"),
    (("embed", "--step"), "Missing value for flag --step"),
    (("embed", "--workdir=a", "--data=b", "--output=c", "d"), "Unexpected arg"),
    (("explain",), "--workdir is missing. Give it, for example --workdir="),
    (("evaluate",), "--workdir is missing. Give it, for example --workdir="),
    (("train", "--config.seed=3"), "--config.seed changes a key of a recipe"),
    (("train", "--config=digits", "--epochs=3"), "too: --config.epochs. --h"),
    (("train", "--config=digits", "--batch-size=3"), "--config.batch_size or"),
    (("train", "--config=digits", "--learning_rate=3"), "base_learning_rate."),
    (("train", "digits"), "Unexpected argument 'digits'; flags start with --."),
    (
      ("train", "--config=digits", "--config.objective.num_bins=3"),
      "'num_bins'. Did you mean 'objective.imsvd.num_bins' or 'objective.mus",
    ),
    (("train", "--epochs=3"), "flags, too: --config.KEY=VALUE. --help"),
    (("train", "--config=configs/digits.py", "--config.sed=3"), "'sed'. Did"),
    (("train", "--config=digits:x"), "error: digits:x: Unknown mode 'x'; k"),
    (("train", "--config=configs/digits.py", "--config.seed=x"), "an integer."),
    (("train", "--flagfile=/nowhere"), "Unable to open flagfile"),
  ],
)
def test_a_wrong_word_is_one_line(words, said):
  check_refused(run_imsvd(*words), said)


def test_the_script_is_the_module():
  text = (ROOT / "setup.py").read_text()
  assert '"imsvd = imsvd_jax.__main__:main"' in text
  assert "scripts" not in tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_a_value_that_jax_does_not_accept_is_one_line():
  result = run_imsvd("benchmark", "loss", JAX_ENABLE_X64="maybe")
  check_refused(result, "JAX does not start: invalid truth value")


def test_the_help_of_pack_works_in_any_folder(tmp_path):
  """Its default recipe is executed, and imports others of its checkout."""
  code = """
import sys
root = sys.argv.pop(1)
sys.path.insert(0, root)
import imsvd_jax.__main__
sys.path[:] = [path for path in sys.path if path != root]
sys.argv[:] = ["imsvd", "pack", "--help"]
imsvd_jax.__main__.main()
"""
  done = run_python("-c", code, str(ROOT), cwd=tmp_path, PYTHONPATH="")
  assert done.returncode == 0, done.stderr
  assert "--output" in done.stdout
