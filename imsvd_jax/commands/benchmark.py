"""Measures speed and precision on this machine.

Every benchmark runs its contenders in turn within one process and prints the
median with the smallest and the largest value; --json prints everything for a
program to read. Measured results are in docs/benchmarks.md. Only `data` needs
TensorFlow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from imsvd_jax.commands import command_line, shared_flags

if TYPE_CHECKING:  # It imports JAX.
  from imsvd_jax.benchmarks.text import Findings

  # What to call after the flags are parsed.
  Measure = Callable[[], Findings]

# Each function below defines the flags of a benchmark and returns the call that
# they describe.


def _loss() -> Measure:
  """Times the loss of IMSVD with its gradient, and what it competes with.

    imsvd benchmark loss --num_images=512 --num_variables=32 --num_bins=32

  The contenders are the streamed kernel, the plain formula, PyTorch, and the
  matrix products alone, which no kernel can avoid. Reports time, memory and
  FLOP.
  """
  num_images, num_variables, num_bins = _define_sizes(num_variables=102)
  dtype = flags.DEFINE_string(
    "dtype", "float32", "Type of the embeddings: float32 or bfloat16."
  )
  kernel = flags.DEFINE_string("kernel", "auto", "auto, plain or streamed.")
  precision = flags.DEFINE_string(
    "precision", "auto", "Of the matrix products: auto, default, high, highest."
  )
  devices = flags.DEFINE_integer(
    "devices", 1, "Devices to split over; a CPU makes as many.", lower_bound=1
  )
  alternatives = flags.DEFINE_bool(
    "alternatives", True, "Also run the other kernel and PyTorch."
  )
  topology = flags.DEFINE_string(
    "topology",
    "",
    "Compile for a slice of TPUs, such as v5e:2x4, and run nothing.",
  )
  rounds = _define_rounds()

  def measure() -> Findings:
    from imsvd_jax.benchmarks import loss_kernel

    problem = loss_kernel.Problem(
      num_images.value,
      num_variables.value,
      num_bins.value,
      dtype=dtype.value,
      kernel=kernel.value,
      precision=precision.value,
      devices=devices.value,
    )
    if topology.value:
      return loss_kernel.benchmark_on(topology.value, problem)
    return loss_kernel.benchmark(
      problem, rounds=rounds.value, alternatives=alternatives.value
    )

  return measure


def _precision() -> Measure:
  """Measures the error that each precision of the matrix products causes.

    imsvd benchmark precision

  Errors are those of the loss and of its gradient, relative to float64.
  """
  sizes = _define_sizes(num_variables=16)

  def measure() -> Findings:
    from imsvd_jax.benchmarks import loss_kernel, loss_precision

    problem = loss_kernel.Problem(*(size.value for size in sizes))
    return loss_precision.benchmark(problem)

  return measure


def _step() -> Measure:
  """Times a recipe's training step and its parts, on random images.

    imsvd benchmark step --config=digits

  Reports images/s, the share of each part, and how close the step comes to what
  this device can do.
  """
  config = shared_flags.define_config()
  devices = flags.DEFINE_integer(
    "devices",
    0,
    "Devices to split over; 0 takes all. A CPU makes as many.",
    lower_bound=0,
  )
  parts = flags.DEFINE_bool(
    "parts", True, "Also time the parts of the step; each is compiled."
  )
  profile = flags.DEFINE_string(
    "profile",
    "",
    "Folder for a profile of three steps, for TensorBoard or Perfetto; the"
    " report then lists the operations that take longest.",
  )
  rounds = _define_rounds()

  def measure() -> Findings:
    from imsvd_jax.benchmarks import step_parts

    return step_parts.benchmark(
      config.value,
      name=shared_flags.config_name(),
      devices=devices.value,
      rounds=rounds.value,
      parts=parts.value,
      profile=profile.value,
    )

  return measure


def _torch_step() -> Measure:
  """Times a recipe's training step in PyTorch, to compare with `step`.

    imsvd benchmark torch_step --config=imagenet_r50

  Two views through the network and IMSVD's loss, without augmentation, and an
  update by SGD: channels last, autocast to the recipe's type.
  """
  config = shared_flags.define_config()
  compiled = flags.DEFINE_bool(
    "compile", False, "Compile the network by torch.compile."
  )
  rounds = _define_rounds()

  def measure() -> Findings:
    from imsvd_jax.benchmarks import torch_step

    return torch_step.benchmark(
      config.value,
      name=shared_flags.config_name(),
      rounds=rounds.value,
      compiled=compiled.value,
    )

  return measure


def _gpu() -> Measure:
  """Measures what matters on a GPU, the most valuable first.

    imsvd benchmark gpu --minutes=8 --output=gpu

  The ResNet-50 step with its parts and a profile, the loss, PyTorch's step, the
  precisions, XLA's flags, and the tests for GPUs. Ends in time with what it
  has; every part's numbers and log, and a report in Markdown, are in --output.
  """
  config = shared_flags.define_config(
    "Recipe; its batch size is the largest that is measured."
  )
  minutes = flags.DEFINE_float(
    "minutes", 8.0, "When to end, at the latest.", lower_bound=0.1
  )
  output = flags.DEFINE_string("output", "gpu", "Folder for the results.")
  only = flags.DEFINE_list(
    "only", [], "Names of the parts to run; all if none."
  )

  def measure() -> Findings:
    from imsvd_jax.benchmarks import gpu_suite

    return gpu_suite.benchmark(
      shared_flags.config_arguments(),
      batch_size=config.value.batch_size,
      seconds=60 * minutes.value,
      output=output.value,
      only=only.value,
    )

  return measure


def _data() -> Measure:
  """Times the host's part of a recipe: reading, decoding, cropping.

    imsvd benchmark data --config=folder_r50 \\
      --config.data.path=~/images

  Reports images/s, the share of each stage, and the cost of augmentation on the
  device.
  """
  config = shared_flags.define_config()
  seconds = flags.DEFINE_float(
    "seconds", 5.0, "How long each measurement lasts.", lower_bound=0.0
  )
  reference = flags.DEFINE_bool(
    "reference", False, "Also time PIL with the same crops on one core."
  )
  photographs = flags.DEFINE_integer(
    "photographs",
    0,
    "Measure on this many 500x375 JPEGs made from scikit-learn's photographs"
    " instead of the recipe's data.",
    lower_bound=0,
  )
  packed = flags.DEFINE_bool(
    "packed", False, "Also pack the images, and measure both beside PIL."
  )

  def measure() -> Findings:
    from imsvd_jax.benchmarks import data_throughput

    return data_throughput.benchmark(
      config.value,
      seconds=seconds.value,
      reference=reference.value,
      photographs=photographs.value,
      packed=packed.value,
    )

  return measure


def _knn() -> Measure:
  """Times k-NN here, in scikit-learn, and by the dense formula.

    imsvd benchmark knn --bank=50000 --queries=10000

  Reports accuracy, time and peak memory of each contender.
  """
  sizes = [
    flags.DEFINE_integer(name, default, about, lower_bound=1)
    for name, default, about in (
      ("bank", 50_000, "Images in the bank."),
      ("queries", 10_000, "Number of queries."),
      ("features", 512, "Features per image."),
      ("neighbors", 200, "k, the number of neighbors."),
    )
  ]

  def measure() -> Findings:
    from imsvd_jax.benchmarks import knn_search

    return knn_search.benchmark(*(size.value for size in sizes))

  return measure


def _search() -> Measure:
  """Times the index of `imsvd search` on drawn vectors, with one thread.

    imsvd benchmark search --vectors=1000000 --features=256

  Reports the time of the build, bytes of a row, and time and recall of queries
  that look into more and more clusters.
  """
  vectors = flags.DEFINE_integer("vectors", 1_000_000, "N.", lower_bound=10)
  features = flags.DEFINE_integer("features", 256, "Of each.", lower_bound=1)

  def measure() -> Findings:
    from imsvd_jax.benchmarks import vector_search

    return vector_search.benchmark(vectors.value, features.value)

  return measure


class _Benchmark(NamedTuple):
  """One line about a benchmark, its function, and the flags it requires."""

  about: str
  define: Callable[[], Measure]
  required: Mapping[str, str] | None = None


BENCHMARKS = {
  "loss": _Benchmark("loss and gradient: time, memory and FLOP", _loss),
  "precision": _Benchmark(
    "errors of loss and gradient by the precision of products", _precision
  ),
  "step": _Benchmark(
    "a recipe's training step: images/s, and where the time goes",
    _step,
    shared_flags.REQUIRED_CONFIG,
  ),
  "torch_step": _Benchmark(
    "the same step in PyTorch", _torch_step, shared_flags.REQUIRED_CONFIG
  ),
  "gpu": _Benchmark(
    "all that matters on a GPU, within some minutes",
    _gpu,
    shared_flags.REQUIRED_CONFIG,
  ),
  "data": _Benchmark(
    "the host's part of a recipe: reading, decoding, cropping",
    _data,
    shared_flags.REQUIRED_CONFIG,
  ),
  "knn": _Benchmark("k-NN, compared with scikit-learn", _knn),
  "search": _Benchmark("the index of `imsvd search` on drawn vectors", _search),
}


def _define_rounds() -> flags.FlagHolder[int]:
  return flags.DEFINE_integer(
    "rounds", 10, "Measured runs of each contender.", lower_bound=1
  )


def _define_sizes(*, num_variables: int) -> tuple[flags.FlagHolder[int], ...]:
  return (
    flags.DEFINE_integer("num_images", 2048, "N, the global batch."),
    flags.DEFINE_integer(
      "num_variables", num_variables, "M, the variables of an embedding."
    ),
    flags.DEFINE_integer(
      "num_bins", 80, "b, the bins of a variable; an embedding has M * b."
    ),
  )


def run() -> None:
  """Runs the benchmark that the first word names."""
  name = command_line.pick(
    "imsvd benchmark",
    {name: benchmark.about for name, benchmark in BENCHMARKS.items()},
    about=__doc__,
  )
  benchmark = BENCHMARKS[name]
  measure = benchmark.define()
  print_findings = shared_flags.define_json()
  command_line.run(
    lambda: print_findings(measure()),
    required=benchmark.required,
    about=inspect.getdoc(benchmark.define),
  )
