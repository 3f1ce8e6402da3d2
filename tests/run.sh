#!/usr/bin/env bash
# Set up, then check style, format and types, and run the tests.
#
#   bash tests/run.sh                 the fast set
#   bash tests/run.sh --all           everything
#   bash tests/run.sh -k ulysses -x   anything else goes to pytest
#   bash tests/run.sh -n 0            in one process of pytest (-s and a debugger need that)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
# shellcheck source=launch/setup.sh
. launch/setup.sh

# Many tests start several processes: one thread each, also because sums depend on the number of threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# No test talks to a server.
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false
# Errors of torch's C++ only: each of many worlds would warn of what gloo does not have.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if "$PYTHON" -m ruff --version >/dev/null 2>&1; then
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
else
  echo "tests/run.sh: no ruff in $PYTHON, style is not checked" >&2
fi
if "$PYTHON" -m pyrefly --version >/dev/null 2>&1; then
  "$PYTHON" -m pyrefly check --python-interpreter-path "$PYTHON" --output-format min-text
else
  echo "tests/run.sh: no pyrefly in $PYTHON, types are not checked" >&2
fi

# Two processes of pytest: one has every test of the pool of workers (tests/conftest.py), the other takes the rest.
spread=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  spread=(-n 2 --dist loadscope --no-loadscope-reorder)
else
  echo "tests/run.sh: no pytest-xdist in $PYTHON, the tests run one after the other" >&2
fi
exec "$PYTHON" -m pytest "${spread[@]}" "$@"
