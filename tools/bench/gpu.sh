#!/usr/bin/env bash
# Everything of the table "On one H200" that is not finished yet, each run in a call of at most 9 minutes, then the table:
#
#   bash tools/bench/gpu.sh [options of python -m tools.bench gpu]      for example --folder runs/bench-gpu --output FILE
#
# Call it again to go on: finished runs are skipped. From the environment:
#
#   PYTHON    the interpreter                                      (default: python)
#   LIMIT     seconds in which the call is over; a run that needs more than is left does not begin   (default: none)
#   PER_RUN   seconds after which a run is stopped, and not kept   (default: 540)
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
python=${PYTHON:-python}
names=$("$python" -m tools.bench gpu "$@" --names) || exit 2
while read -r name least; do
  [[ -n $name ]] || continue
  allowed=${PER_RUN:-540}
  if [[ -n ${LIMIT:-} ]]; then
    left=$((LIMIT - SECONDS - 30)) # for the end of a run that is stopped, and the table
    if ((left < least)); then
      echo "gpu.sh: $name needs $least s, and LIMIT=$LIMIT leaves $left: for the next call" >&2
      continue
    fi
    allowed=$((left < allowed ? left : allowed))
  fi
  echo "gpu.sh: $name, at most $allowed s" >&2
  timeout --kill-after=10 "$allowed" "$python" -m tools.bench gpu "$@" --run "$name" </dev/null >&2 ||
    echo "gpu.sh: $name is not finished (exit code $?)" >&2
done <<<"$names"
exec "$python" -m tools.bench gpu "$@"
