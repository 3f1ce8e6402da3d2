#!/usr/bin/env bash
# Everything of the table "On one H200" that is not finished yet, each run in a call of at most 9 minutes, then the table:
#
#   bash tools/bench/gpu.sh [options of python -m tools.bench gpu]      for example --folder runs/bench-gpu --output FILE
#
# Call it again to go on: finished runs are skipped. From the environment:
#
#   PYTHON    the interpreter                                      (default: python)
#   LIMIT     seconds in which the call is over: a run gets what is left, and none begins in the last minute (default: none)
#   PER_RUN   seconds after which a run is stopped, and not kept   (default: 540)
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
python=${PYTHON:-python}
names=$("$python" -m tools.bench gpu "$@" --names) || exit 2
for name in $names; do
  allowed=${PER_RUN:-540}
  if [[ -n ${LIMIT:-} ]]; then
    left=$((LIMIT - SECONDS - 15)) # for the end of a run that is stopped, and the table
    if ((left < 60)); then
      echo "gpu.sh: LIMIT=$LIMIT is over; the rest from $name on is for the next call" >&2
      break
    fi
    allowed=$((left < allowed ? left : allowed))
  fi
  echo "gpu.sh: $name, at most $allowed s" >&2
  timeout --kill-after=10 "$allowed" "$python" -m tools.bench gpu "$@" --run "$name" >&2 ||
    echo "gpu.sh: $name is not finished (exit code $?)" >&2
done
exec "$python" -m tools.bench gpu "$@"
