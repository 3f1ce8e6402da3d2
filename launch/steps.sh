# shellcheck shell=bash disable=SC2034,SC2154  # shared with who sources it
# What scripts of several steps share: headings, and a stop that reaches the step under way. Sourced, after setting
# `script` (its name) and `steps` (their number).
step=0 heading="start" child=""

begin() {
  step=$((step + 1)) heading=$1
  printf '\n[%d/%d] %s  (%d:%02d so far)\n' "$step" "$steps" "$heading" $((SECONDS / 60)) $((SECONDS % 60))
}
skip() { printf '      already there: %s\n' "$1"; }
fail() {
  printf '\n%s: step %d (%s) failed: %s\n' "$script" "$step" "$heading" "$1" >&2
  exit "${2:-1}"
}

# Run a command so that a signal to this script reaches it: bash alone would leave it behind.
stop() { [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true; stopping=yes; }
stopping=""
trap stop INT TERM HUP
attempt() {
  local code=0
  [[ -z $stopping ]] || exit 75
  { "$@" <&3 & } 3<&0  # bash would give it an empty input
  child=$!
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do  # a trap ended the wait, not the command
    code=0
    wait "$child" || code=$?
  done
  if [[ -n $stopping ]]; then
    code=0
    wait "$child" 2>/dev/null || code=$?
  fi
  child=""
  if [[ -n $stopping || $code -eq 75 ]]; then
    printf '\n%s: stopped in step %d (%s); the same command goes on from here.\n' "$script" "$step" "$heading" >&2
    exit 75
  fi
  return "$code"
}

# What the machine has, for runs whose layouts are made of fours: sets processes, precision and where.
choose_devices() {
  local gpus=0
  if command -v nvidia-smi >/dev/null 2>&1; then gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true); fi
  precision=--bf16
  if [[ $gpus -ge 4 ]]; then
    processes=$((gpus / 4 * 4)) where="$((gpus / 4 * 4)) GPUs"
  elif [[ $gpus -ge 1 ]]; then
    processes=1 where="1 GPU"
  else
    processes=4 where="4 processes on the CPU"
    if ! grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null; then
      precision=--no-bf16 where="$where in fp32 (no bf16 units)"  # emulated, bf16 is many times slower
    fi
  fi
}
