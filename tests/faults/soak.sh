#!/usr/bin/env bash
# Kill runs at random moments, and compare each with the same run left alone:
#
#   bash tests/faults/soak.sh --kills 500     about 10 s a kill on 2 cores
#   bash tests/faults/soak.sh --help          what else it takes
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
# shellcheck source=launch/setup.sh
. "$root/launch/setup.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m tests.faults.soak "$@"
