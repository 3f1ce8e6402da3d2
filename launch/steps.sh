# shellcheck shell=bash disable=SC2034,SC2154  # shared with who sources it
# What scripts of several steps share: headings, and a stop that reaches the step under way.
# Sourced, after setting `root`, `script` (its name) and `steps` (their number).
step=0
heading="start"
child=""
stopping=""  # "yes" once a signal came

begin() {
  step=$((step + 1))
  heading=$1
  printf '\n[%d/%d] %s  (%d:%02d so far)\n' \
    "$step" "$steps" "$heading" $((SECONDS / 60)) $((SECONDS % 60))
}
skip() { printf '      already there: %s\n' "$1"; }
fail() {
  printf '\n%s: step %d (%s) failed: %s\n' "$script" "$step" "$heading" "$1" >&2
  exit "${2:-1}"
}

# Run a command so that a signal to this script reaches it: bash alone would leave it behind.
stop() {
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
  stopping=yes
}
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
    printf '\n%s: stopped in step %d (%s); the same command goes on from here.\n' \
      "$script" "$step" "$heading" >&2
    exit 75
  fi
  return "$code"
}

# A step that is one of the front door's commands.
ithaca() { attempt bash "$root/launch/ithaca.sh" "$@"; }
