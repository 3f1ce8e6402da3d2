#!/usr/bin/env bash
# Set up, then check style and run the tests.
#
#   bash tests/run.sh                 the fast set
#   bash tests/run.sh --all           everything
#   bash tests/run.sh -k ulysses -x   anything else goes to pytest
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
# shellcheck source=launch/setup.sh
. launch/setup.sh

# Many tests start several processes: one thread each, also because sums depend on the number of threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# No test talks to a server.
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if "$PYTHON" -m ruff --version >/dev/null 2>&1; then
  "$PYTHON" -m ruff check .
else
  echo "tests/run.sh: no ruff in $PYTHON, style is not checked" >&2
fi
exec "$PYTHON" -m pytest "$@"
