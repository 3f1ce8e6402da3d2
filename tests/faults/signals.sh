#!/usr/bin/env bash
# Stop runs by signals at random moments, on one node and on two:
#
#   bash tests/faults/signals.sh --stops 100   about 15 s a stop on 2 cores
#   bash tests/faults/signals.sh --help        what else it takes
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
# shellcheck source=launch/setup.sh
. "$root/launch/setup.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m tests.faults.signals "$@"
