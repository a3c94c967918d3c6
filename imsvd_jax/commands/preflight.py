"""Reports what a run would cost on a TPU slice, on a machine without one.

  imsvd preflight --config=imagenet_r50 \\
    --topology=v5e:4x4 --num_examples=1281167

Compiles the real train step for the slice (minutes for a ResNet-50) and reports
per chip: memory and whether it fits, arithmetic, memory traffic, every
collective, and a lower bound on the time of a step and of an epoch. Nothing
runs. `pip install "imsvd_jax[tpu]"` installs the compiler; --topology=cpu:8
needs nothing.
"""

import faulthandler
import sys

from absl import flags

from imsvd_jax.benchmarks import compiler_process
from imsvd_jax.commands import command_line, shared_flags

_CONFIG = shared_flags.define_config()
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "What to compile for: v5e:4x4, v4:2x2x4, cpu:8, ..."
)
_NUM_EXAMPLES = flags.DEFINE_integer(
  "num_examples",
  None,
  "Images in the train split, for the time per epoch. By default the recipe's"
  " data.num_examples if its source makes that many.",
  lower_bound=1,
)
_FIND_BATCH = flags.DEFINE_bool(
  "find_batch",
  False,
  "Search the largest batch that fits; takes a few compilations.",
)
_COMPARE_SHARDING = flags.DEFINE_bool(
  "compare_sharding",
  False,
  "Compile with each mode of sharding.state, and print a table of them.",
)
_print_findings = shared_flags.define_json()


def main() -> int | None:
  """Prints the report of --config on --topology."""
  if not compiler_process.is_own_process():
    return compiler_process.in_own_process(["preflight", *sys.argv[1:]])
  faulthandler.disable()  # absl's; the first process says it shorter.
  from imsvd_jax.benchmarks import preflight_compile

  findings = preflight_compile.measure(
    _CONFIG.value,
    name=shared_flags.config_name(),
    topology=_TOPOLOGY.value,
    num_examples=_NUM_EXAMPLES.value,
    find_batch=_FIND_BATCH.value,
    compare_sharding=_COMPARE_SHARDING.value,
  )
  _print_findings(findings)
  return None


def run() -> None:
  """Runs the command line."""
  command_line.run(
    main, required={**shared_flags.REQUIRED_CONFIG, "topology": "v5e:4x4"}
  )
