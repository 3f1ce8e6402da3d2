#!/usr/bin/env bash
# Everything of the table "On one H200" that is not finished yet, each run in a call of at most 9 minutes, then the table:
#
#   bash tools/bench/gpu.sh [options of python -m tools.bench gpu]      for example --folder runs/bench-gpu --output FILE
#
# Call it again to go on: finished runs are skipped. From the environment:
#
#   PYTHON    the interpreter                                      (default: python)
#   LIMIT     seconds after which no further run begins            (default: none)
#   PER_RUN   seconds after which a run is stopped, and not kept   (default: 540)
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
python=${PYTHON:-python}
names=$("$python" -m tools.bench gpu "$@" --names) || exit 2
for name in $names; do
  if [[ -n ${LIMIT:-} ]] && ((SECONDS >= LIMIT)); then
    echo "gpu.sh: LIMIT=$LIMIT is over; the rest from $name on is for the next call" >&2
    break
  fi
  echo "gpu.sh: $name" >&2
  timeout --kill-after=10 "${PER_RUN:-540}" "$python" -m tools.bench gpu "$@" --run "$name" >&2 ||
    echo "gpu.sh: $name is not finished (exit code $?)" >&2
done
exec "$python" -m tools.bench gpu "$@"
