#!/usr/bin/env bash
# Checks the recipe of a run that other machines train, before they cost money;
# used by tpu_pod.sh and xpk.sh.
#
#   launch/check_recipe.sh --config=FILE [flags of imsvd train ...]
#
# It says so and succeeds where this machine lacks the package's libraries.
#
# Environment: PYTHON, the interpreter (default: python).
set -euo pipefail

case ${1:-} in
  --help | -h)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  '')
    echo "error: --config is missing; usage: launch/check_recipe.sh" \
      "--config=FILE [flags of imsvd train ...], see --help." >&2
    exit 2
    ;;
esac
python=${PYTHON:-python}
# The other machines run it from the top of the checkout, too.
cd "$(dirname "$0")/.."
if ! "$python" -c 'import flax, ml_collections, optax' &>/dev/null; then
  echo "The recipe is not checked: $python lacks the libraries for it." >&2
  exit 0
fi
JAX_PLATFORMS=cpu "$python" -m imsvd_jax.commands.check_recipe "$@"
