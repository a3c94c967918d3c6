"""`imsvd COMMAND`, which is `python -m imsvd_jax COMMAND`."""

import importlib
import sys

from imsvd_jax.base.errors import UserError, suggestion

# Command -> its module, which has `run()`, and what it does in one line.
COMMANDS = {
  "train": ("main", "pretrain an encoder by a recipe, or resume"),
  "evaluate": ("commands.evaluate", "measure runs by named protocols"),
  "explain": ("commands.explain", "show what each variable of a run means"),
  "export": ("commands.export", "write weights for PyTorch and others"),
  "import_weights": ("commands.import_weights", "make a run from a file"),
  "embed": ("commands.embed", "write features and codes of a folder"),
  "compare": ("commands.compare", "train recipes side by side, over seeds"),
  "benchmark": ("commands.benchmark", "measure what things cost here"),
  "preflight": ("commands.preflight", "compile a step for TPUs not at hand"),
}


def main() -> None:
  """Runs the command that the first word names; alone, lists them."""
  word = sys.argv[1] if len(sys.argv) > 1 else ""
  if word in ("", "help", "--help", "-h"):
    print("imsvd COMMAND [flags]; imsvd COMMAND --help lists its flags.\n")
    print("\n".join(f"  {n:15} {line}" for n, (_, line) in COMMANDS.items()))
    return
  name = word.replace("-", "_")
  if name not in COMMANDS:
    print(
      f"error: Unknown command {word!r}.{suggestion(name, COMMANDS)} Known:"
      f" {', '.join(COMMANDS)}.",
      file=sys.stderr,
    )
    sys.exit(UserError.exit_code)
  # Before the import: ml_collections reads --config while flags are defined.
  sys.argv[:2] = [f"imsvd {name}"]
  importlib.import_module(f"imsvd_jax.{COMMANDS[name][0]}").run()


if __name__ == "__main__":
  main()
