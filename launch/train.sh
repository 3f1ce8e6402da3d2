#!/usr/bin/env bash
# Train on this node, and start again when the run asks for it:
#
#   bash launch/ithaca.sh train --config FILE [--flags]     everything goes to `-m pretrain.train`
#
# Relative paths are relative to the folder you call from. Run it once on every node. From the
# environment:
#
#   NPROC_PER_NODE   processes on this node     (default: the number of GPUs, 1 where there is none)
#   NNODES           nodes                      (default: 1)
#   NODE_RANK        this node's number         (default: 0)
#   MASTER_ADDR      node 0's name or address   (needed with NNODES > 1)
#   MASTER_PORT      a port that is free there  (default: 29500; on one node the kernel chooses)
#   JOIN_WAIT        seconds to wait for the other nodes (default: 1800)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME      (default: the interface that reaches MASTER_ADDR)
#   OMP_NUM_THREADS  CPU threads a process      (default: cores / NPROC_PER_NODE)
#   PYTORCH_CUDA_ALLOC_CONF  torch's GPU memory (default: expandable_segments:True;
#                                                empty for torch's own)
#   GRACE            seconds from a stop signal to the kill: one step + one save (default: 120)
#   MAX_RESTARTS     restarts after a failure with no new checkpoint in between (default: 3)
#   RETRY_WAIT       seconds before the second such restart, doubled each time (default: 5);
#                    the first one comes at once
#   ITHACA_PYTHON    see launch/setup.sh
#
# Of the first five, PET_NNODES and so on count where these are not set: launch/KUBERNETES.md.
#
# Local rank 0 says how the run ended in the file ITHACA_OUTCOME_FILE:
#
#   done      exit 0
#   again     start again at once (the next phase has another layout, the newest checkpoint is
#             damaged and an earlier one is taken, or a spike goes back)
#   stopped   exit 75, "try again later": a signal or --exit-interval; the state is saved
#   unstarted exit 75: a signal came before the first step
#   refused   exit 2: the configuration is wrong, so another try can't help
#   unmet     exit 1: a node did not come within JOIN_WAIT seconds
#   nothing   a failure: start again, a bounded number of times, then exit 1; the same error twice
#             at the same step, without a new checkpoint in between, is not tried a third time
#
# A stop signal (TERM INT HUP USR1) stops all nodes, whichever gets it. One that no outcome answers
# gives 128 + its number.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/devices.sh
. "$root/launch/devices.sh"

say() { printf 'train.sh: %s\n' "$*" >&2; }

refuse() {
  say "error: $*"
  exit 2
}

require_number() {  # NAME smallest
  [[ ${!1} =~ ^[0-9]+$ && ${!1} -ge $2 ]] ||
    refuse "$1 = ${!1}: must be a whole number, at least $2"
}

# --- the processes --------------------------------------------------------------------------------
# Where these settings are not given, take what an operator of Kubernetes gives: torchrun's own names
# with PET_ before them, or, as older ones do, WORLD_SIZE and RANK of the pods.
read_operator() {
  local name given taken=""
  for name in NNODES NODE_RANK NPROC_PER_NODE MASTER_ADDR MASTER_PORT; do
    given=PET_$name
    given=${!given:-}
    # "auto", "gpu" and "cpu" leave the number of processes to us.
    [[ $name == NPROC_PER_NODE && ! $given =~ ^[0-9] ]] && continue
    if [[ -z ${!name:-} && -n $given ]]; then
      printf -v "$name" %s "$given"
      taken+=" PET_$name = $given"
    fi
  done
  # A process that torchrun has started has these names, too, but with LOCAL_RANK.
  if [[ -z ${NNODES:-}${LOCAL_RANK:-} && -n ${MASTER_ADDR:-} && -n ${WORLD_SIZE:-} &&
    -n ${RANK:-} ]]; then
    NNODES=$WORLD_SIZE
    NODE_RANK=${NODE_RANK:-$RANK}
    taken+=" WORLD_SIZE = $WORLD_SIZE nodes RANK = $RANK"
  fi
  [[ -z $taken ]] || say "from the environment:$taken"
}

read_counts() {
  if [[ -z ${NPROC_PER_NODE:-} ]]; then
    NPROC_PER_NODE=$(count_gpus)
    if [[ $NPROC_PER_NODE -eq 0 ]]; then
      NPROC_PER_NODE=1
      say "no GPU found: 1 process (set NPROC_PER_NODE for more)"
    fi
  fi
  NNODES=${NNODES:-1}
  require_number NPROC_PER_NODE 1
  require_number NNODES 1
}

# Whether one process, which stands for rank 0, can answer without starting the others.
is_question() {
  local argument
  for argument in "$@"; do
    case $argument in
      -h | --help | --print-config | --print_config) return 0 ;;
    esac
  done
  return 1
}

# --- this node's settings -------------------------------------------------------------------------
read_settings() {
  NODE_RANK=${NODE_RANK:-0}
  GRACE=${GRACE:-120}
  MAX_RESTARTS=${MAX_RESTARTS:-3}
  RETRY_WAIT=${RETRY_WAIT:-5}
  JOIN_WAIT=${JOIN_WAIT:-1800}
  require_number NODE_RANK 0
  require_number GRACE 1
  require_number MAX_RESTARTS 0
  require_number RETRY_WAIT 0
  require_number JOIN_WAIT 1
  [[ $NODE_RANK -lt $NNODES ]] || refuse "NODE_RANK = $NODE_RANK: must be below NNODES = $NNODES"
  read_meeting_place
}

# Sets port: where the nodes meet on node 0.
read_meeting_place() {
  port=0  # on one node the kernel chooses it
  if [[ $NNODES -gt 1 ]]; then
    [[ -n ${MASTER_ADDR:-} ]] || refuse "NNODES = $NNODES needs MASTER_ADDR, the address of node 0"
    MASTER_PORT=${MASTER_PORT:-29500}
    require_number MASTER_PORT 1
    [[ $MASTER_PORT -le 65535 ]] ||
      refuse "MASTER_PORT = $MASTER_PORT: must be a whole number, at most 65535"
    port=$MASTER_PORT
  elif [[ -n ${MASTER_ADDR:-}${MASTER_PORT:-} ]]; then
    say "MASTER_ADDR and MASTER_PORT have no effect with NNODES = 1:" \
      "the processes of one node find each other"
  fi
}

# What torch reads from the environment.
set_environment() {
  if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    OMP_NUM_THREADS=$(($(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) / NPROC_PER_NODE))
    [[ $OMP_NUM_THREADS -ge 1 ]] || OMP_NUM_THREADS=1
  fi
  export OMP_NUM_THREADS
  # A phase's long samples leave holes in GPU memory that fixed segments can't fill; expandable ones
  # can. Whoever sets any of torch's names for this, also to nothing, decides alone: torch reads the
  # first of them that is set.
  local given=${PYTORCH_CUDA_ALLOC_CONF+set}${PYTORCH_HIP_ALLOC_CONF+set}${PYTORCH_ALLOC_CONF+set}
  if [[ -z $given ]]; then
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  fi
  # torch warns about process groups of two backends when it leaves them; its errors stay visible.
  export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
}

# --- signals --------------------------------------------------------------------------------------
child=""      # the launcher's process, while there is one
signal=""     # the first stop signal that came
forwarded=""  # whether the launcher got it
repeats=0     # how many came after the first

on_signal() {
  if [[ -n $signal ]]; then
    repeats=$((repeats + 1))
    if [[ $1 == INT && $repeats -ge 2 ]]; then
      say "third signal: ending without a save"
      end_leftovers
    else
      say "SIG$1: already stopping (up to $GRACE s); Ctrl-C again ends without a save"
    fi
    return
  fi
  signal=$1
  say "SIG$1: asking the run to save and stop (up to $GRACE s)"
  forward
}

forward() {  # once to each launcher
  local tick
  if [[ -n $signal && -n $child && -z $forwarded ]]; then
    forwarded=yes
    # A launcher that has just been started would die of it without a word.
    for ((tick = 0; tick < 1000; tick++)); do
      [[ ! -e $ITHACA_OUTCOME_FILE.hears ]] && kill -0 "$child" 2>/dev/null || break
      sleep 0.02
    done
    kill "-$signal" "$child" 2>/dev/null
  fi
}

# Workers run in sessions of their own, and what they start may outlive them; the outcome file's name
# in their environment tells them apart from everything else on the machine.
end_leftovers() {
  local mark="ITHACA_OUTCOME_FILE=$scratch/"
  local environment pid
  while read -r environment; do
    pid=${environment#/proc/}
    kill -KILL "${pid%/environ}" 2>/dev/null
  done < <(env -u ITHACA_OUTCOME_FILE grep -lsaF "$mark" /proc/[0-9]*/environ 2>/dev/null)
  [[ -z $child ]] || kill -KILL -- "-$child" 2>/dev/null
}

set_traps() {
  local name
  # Bash would die of a line that nobody reads any more.
  trap '' PIPE
  for name in TERM INT HUP USR1; do
    # shellcheck disable=SC2064  # the name is meant now
    trap "on_signal $name" "$name"
  done
  trap 'end_leftovers; clean_up' EXIT
}

# Without --save the errors of the last launch have no other place.
clean_up() {
  if [[ -n $save || -z $has_failed || -z $(ls -A "$ITHACA_ERRORS" 2>/dev/null) ]]; then
    rm -rf "$scratch"
  fi
}

# --- one launch -----------------------------------------------------------------------------------
launch() {  # number of the launch, then the trainer's arguments; returns the launcher's exit code
  local number=$1 code
  shift
  export ITHACA_OUTCOME_FILE="$scratch/outcome.$number"
  export ITHACA_ERRORS="$scratch/errors.$number"
  rm -rf "$scratch/errors.$((number - 1))"
  mkdir "$ITHACA_ERRORS"
  forwarded=""
  # Job control gives the launcher a process group of its own (Ctrl-C reaches it once, from here)
  # and keeps bash from making it ignore SIGINT.
  set -m
  "$PYTHON" -m launch.node --parent $$ \
    --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC_PER_NODE" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$port" \
    --grace "$GRACE" --join-wait "$JOIN_WAIT" --number "$number" --pause "$pause" \
    --errors "${save:+$save/errors}" pretrain.train "$@" </dev/null &
  child=$!
  set +m
  forward  # a signal that came while we were starting
  # `wait` returns early, with a code above 128, whenever a trap runs.
  wait "$child" 2>/dev/null
  code=$?
  if [[ -n $signal ]]; then
    wait_for_stop
    wait "$child" 2>/dev/null
    code=$?
  fi
  end_leftovers
  child=""
  return "$code"
}

# The launcher ends its workers itself; the deadline is for a launcher that hangs.
wait_for_stop() {
  local deadline=$((SECONDS + 2 * GRACE + 30))
  while kill -0 "$child" 2>/dev/null; do
    if [[ $SECONDS -ge $deadline ]]; then
      say "the launcher did not end: killing it"
      end_leftovers
    fi
    sleep 0.1
  done
}

# --- until it is over -----------------------------------------------------------------------------
# The latest checkpoint, to tell a run that moves on from one that is stuck.
published() { cat "${save:-/dev/null}/latest_checkpointed_iteration.txt" 2>/dev/null || true; }

# Ends this script, unless the run is to start again: then `failures` counts the failures in a row.
act_on_outcome() {  # the outcome and the launcher's exit code
  local outcome=$1 code=$2
  pause=0
  case $outcome in
    "" | refused | unmet) ;;  # that the launcher failed, too, is no surprise
    *)
      [[ $code -eq 0 || -n $signal ]] ||
        say "warning: the run ended as '$outcome', but the launcher with code $code" ;;
  esac
  case $outcome in
    done) exit 0 ;;
    refused) exit 2 ;;
    unmet) exit 1 ;;
    unstarted)
      say "stopped before the first step; the same command goes on"
      exit 75 ;;
    stopped)
      say "stopped; $goes_on"
      exit 75 ;;
    again)
      failures=0
      # Other nodes may have gone on before the signal came: the next launch tells them.
      [[ -n $signal ]] && { [[ $NNODES -eq 1 || $code -ge 128 ]] || return; }
      if [[ -n $signal ]]; then
        say "stopped between two starts; the same command goes on"
        exit 75
      fi
      say "starting again, as the run says above"
      return ;;
    "") ;;
    *) say "error: unknown outcome '$outcome'" ;;
  esac
  if [[ -n $signal && $code -ge 128 ]]; then
    say "ended by SIG$signal without an orderly stop${save:+; the last checkpoint counts}"
    exit $((128 + $(kill -l "$signal")))
  fi
  has_failed=yes
  if [[ -z $signal ]]; then
    plan_restart "$code"
  elif [[ $NNODES -eq 1 ]]; then
    say "stopped after a failure; $goes_on"
    exit 75
  fi  # else the next launch tells the other nodes, which may wait for this one
}

plan_restart() {  # the launcher's exit code; sets pause, or gives up
  local error
  [[ -z $save || $(published) == "$before" ]] || failures=0
  failures=$((failures + 1))
  error=$(cat "$ITHACA_OUTCOME_FILE.error" 2>/dev/null)
  if [[ $failures -gt 1 && -n $error && $error == "$last_error" ]]; then
    say "error: the same error twice at the same step, without a new checkpoint in between:" \
      "another start would end the same way; giving up"
    say "error: $error"
    exit 1
  fi
  last_error=$error
  if [[ $failures -gt $MAX_RESTARTS ]]; then
    say "error: failed $failures times without a new checkpoint (exit code $1); giving up"
    exit 1
  fi
  # The launcher waits, so that the nodes meet and the processes import torch meanwhile.
  if [[ $failures -gt 1 ]]; then
    pause=$((failures <= 7 ? RETRY_WAIT << (failures - 2) : RETRY_WAIT << 5))
  fi
  say "the run failed (exit code $1); restart $failures of $MAX_RESTARTS in $pause s"
}

# --- from top to bottom ---------------------------------------------------------------------------
if [[ $# -eq 0 ]]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
  exit 2
fi
read_operator
read_counts
is_question "$@" || read_settings
set_environment
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh" || exit 1
if is_question "$@"; then
  RANK=0 LOCAL_RANK=0 LOCAL_WORLD_SIZE=$NPROC_PER_NODE WORLD_SIZE=$((NNODES * NPROC_PER_NODE)) \
    exec "$PYTHON" -m pretrain.train "$@"
fi
scratch=$(mktemp -d "${TMPDIR:-/tmp}/ithaca.XXXXXX") || exit 1
has_failed=""  # whether the last launch did
save=""
set_traps
save=$("$PYTHON" "$root/launch/save_folder.py" "$@")
goes_on="the same command goes on from the last checkpoint"
[[ -n $save ]] || goes_on="nothing is saved without --save: the same command begins again"

failures=0     # since the last new checkpoint
last_error=""  # of the failure before
pause=0        # seconds before the processes of the next launch train
launches=0
while true; do
  launches=$((launches + 1))
  before=$(published)
  has_failed=""
  launch "$launches" "$@"
  code=$?
  outcome=$(cat "$ITHACA_OUTCOME_FILE" 2>/dev/null || true)
  act_on_outcome "$outcome" "$code"
done
