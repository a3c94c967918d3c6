"""Measures what things cost on this machine.

  python -m imsvd_jax benchmark COMMAND [flags]; COMMAND --help lists its flags.

Commands:
  loss       the objective's loss and gradient: time, memory, FLOP, against
             the plain formula, PyTorch and the matrix products alone
  precision  the error that each precision of those products causes
  step       a config's whole training step: images/s, where its time goes,
             and its distance to what this device can do
  data       the host half: reading, decoding, cropping
  knn        k-NN against scikit-learn

Every command measures its contenders in turn within one run, prints the median
with the least and the greatest, and with --json everything for a machine.
Measured results are in docs/benchmarks.md. Only `data` needs TensorFlow.
"""

import json

from absl import flags
from ml_collections import config_flags

from imsvd_jax.base import cpu_devices
from imsvd_jax.commands import command_line

FLAGS = flags.FLAGS


def _common_flags(rounds: int) -> None:
  flags.DEFINE_integer(
    "rounds", rounds, "Measured runs of each contender.", lower_bound=1
  )
  flags.DEFINE_bool("json", False, "Print the figures as JSON.")


def _problem_flags(num_variables: int) -> None:
  flags.DEFINE_integer("num_images", 2048, "N, the global batch.")
  flags.DEFINE_integer("num_variables", num_variables, "M.")
  flags.DEFINE_integer("num_bins", 80, "b; an embedding has M * b entries.")


def _config_flag() -> None:
  config_flags.DEFINE_config_file(
    "config", None, "Recipe file, such as configs/digits.py.", lock_config=True
  )
  command_line.require_config()


def _use_devices(count: int) -> None:
  """Makes as many CPU devices, before JAX counts them."""
  if count > 0:
    cpu_devices.make(count)


def _print(module, *results) -> None:
  if FLAGS.json:
    print(json.dumps(module.as_dict(*results), indent=2))
  else:
    print(module.as_text(*results))


# --- loss ---------------------------------------------------------------------


def _loss_flags() -> None:
  _common_flags(rounds=10)
  _problem_flags(num_variables=102)
  flags.DEFINE_string("dtype", "float32", "Of the embeddings; or bfloat16.")
  flags.DEFINE_string("kernel", "auto", "auto, plain or streamed.")
  flags.DEFINE_string(
    "precision", "auto", "Of the matrix products: auto, default, high, ..."
  )
  flags.DEFINE_integer(
    "devices",
    1,
    "Devices to split over; a CPU makes as many.",
    lower_bound=1,
  )
  flags.DEFINE_bool(
    "alternatives", True, "Also run the other kernel and PyTorch."
  )
  flags.DEFINE_string(
    "topology",
    "",
    "Compile for a slice of TPUs, such as v5e:2x4, and run nothing.",
  )


def _loss(argv: list[str]) -> None:
  del argv
  # Imported late, so that --help and a bad flag answer at once.
  from imsvd_jax.benchmarks import loss_kernel, machine

  problem = loss_kernel.Problem(
    num_images=FLAGS.num_images,
    num_variables=FLAGS.num_variables,
    num_bins=FLAGS.num_bins,
    dtype=FLAGS.dtype,
    kernel=FLAGS.kernel,
    precision=FLAGS.precision,
    devices=FLAGS.devices,
  )
  loss_kernel.check(problem)
  if FLAGS.topology:
    _loss_on(problem)
    return
  _use_devices(FLAGS.devices)
  about = machine.describe(machine.devices(problem.devices))
  results = loss_kernel.measure(
    problem, rounds=FLAGS.rounds, alternatives=FLAGS.alternatives
  )
  _print(loss_kernel, problem, results, about)


def _loss_on(problem) -> None:
  """Prints what the loss would cost on --topology."""
  import jax

  # Never take the accelerators of this machine: other programs may use them.
  jax.config.update("jax_platforms", "cpu")
  from imsvd_jax.benchmarks import loss_kernel, machine
  from imsvd_jax.benchmarks.costs import slices

  slice_ = slices.get_slice(FLAGS.topology)
  about = machine.describe(list(slice_.devices))
  results = loss_kernel.compile_for(problem, slice_)
  if FLAGS.json:
    print(json.dumps(loss_kernel.as_dict(problem, results, about), indent=2))
  else:
    print(loss_kernel.compiled_as_text(problem, slice_, results))


# --- precision ----------------------------------------------------------------


def _precision_flags() -> None:
  flags.DEFINE_bool("json", False, "Print the figures as JSON.")
  _problem_flags(num_variables=16)


def _precision(argv: list[str]) -> None:
  del argv
  from imsvd_jax.benchmarks import loss_kernel, loss_precision, machine

  problem = loss_kernel.Problem(
    FLAGS.num_images, FLAGS.num_variables, FLAGS.num_bins
  )
  about = machine.describe(machine.devices(1))
  _print(loss_precision, problem, loss_precision.measure(problem), about)


# --- step ---------------------------------------------------------------------


def _step_flags() -> None:
  _common_flags(rounds=10)
  _config_flag()
  flags.DEFINE_integer(
    "devices",
    0,
    "Devices to split over; 0: all. A CPU makes as many.",
    lower_bound=0,
  )


def _step(argv: list[str]) -> None:
  del argv
  _use_devices(FLAGS.devices)
  import jax

  from imsvd_jax.benchmarks import machine, step_parts

  used = machine.devices(FLAGS.devices or len(jax.devices()))
  about = machine.describe(used)
  result = step_parts.measure(FLAGS.config, used, rounds=FLAGS.rounds)
  name = config_flags.get_config_filename(FLAGS["config"])
  _print(step_parts, name, result, about)


# --- data ---------------------------------------------------------------------


def _data_flags() -> None:
  _config_flag()
  flags.DEFINE_bool("json", False, "Print the figures as JSON.")
  flags.DEFINE_float(
    "seconds", 5.0, "How long each measurement lasts.", lower_bound=0.0
  )
  flags.DEFINE_bool(
    "reference", False, "Also time PIL doing the same crops on one core."
  )
  flags.DEFINE_integer(
    "photographs",
    0,
    "Measure on this many 500x375 JPEGs made from scikit-learn's photographs"
    " instead of the config's data.",
    lower_bound=0,
  )


def _data(argv: list[str]) -> None:
  del argv
  from imsvd_jax.benchmarks import data_path  # Imports TensorFlow.

  data_path.main(
    FLAGS.config,
    seconds=FLAGS.seconds,
    reference=FLAGS.reference,
    photographs=FLAGS.photographs,
    as_json=FLAGS.json,
  )


# --- knn ----------------------------------------------------------------------


def _knn_flags() -> None:
  flags.DEFINE_bool("json", False, "Print the figures as JSON.")
  flags.DEFINE_integer("bank", 50_000, "Images in the bank.", lower_bound=1)
  flags.DEFINE_integer("queries", 10_000, "Queries.", lower_bound=1)
  flags.DEFINE_integer("features", 512, "Features per image.", lower_bound=1)
  flags.DEFINE_integer("neighbors", 200, "k.", lower_bound=1)


def _knn(argv: list[str]) -> None:
  del argv
  from imsvd_jax.base.errors import UserError
  from imsvd_jax.benchmarks import knn_search as knn

  if FLAGS.neighbors > FLAGS.bank:
    raise UserError(
      f"--neighbors={FLAGS.neighbors} of a bank of {FLAGS.bank}; expected at"
      " most that many."
    )
  sizes = (FLAGS.bank, FLAGS.queries, FLAGS.features, FLAGS.neighbors)
  found = knn.compare(sizes)
  if FLAGS.json:
    print(json.dumps([one._asdict() for one in found], indent=2))
  else:
    print(knn.table(found))


_COMMANDS = {
  "loss": (_loss_flags, _loss),
  "precision": (_precision_flags, _precision),
  "step": (_step_flags, _step),
  "data": (_data_flags, _data),
  "knn": (_knn_flags, _knn),
}


def run() -> None:
  """Runs the command line."""
  _command = command_line.command(_COMMANDS)
  _define_flags, _main = _COMMANDS[_command]
  _define_flags()
  command_line.run(_main, max_arguments=1)  # The command.
