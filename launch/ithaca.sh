#!/usr/bin/env bash
# The front door: every command of this repository, from any folder.
#
#   bash launch/ithaca.sh COMMAND [ARGUMENTS]
#   bash launch/ithaca.sh COMMAND --help
#
# Relative paths are relative to the folder you call from; nothing that lies there is imported.
# Arguments go to the command as they are, and its exit code comes back.
set -uo pipefail

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd -P)

# command | what runs it: a script of launch/ or a module | what it does
commands() {
  cat <<'TABLE'
train              | train.sh                 | train on this node: --config FILE [--flags]
plan               | plan                     | check a run and estimate it: --config FILE [--flags]
train-tokenizer    | tools.train_tokenizer    | train a SentencePiece tokenizer on text
preprocess         | tools.preprocess_data    | turn text into token files (.bin, .idx)
inspect            | tools.inspect_data       | show what tokens, a batch or a run's data hold
inspect-checkpoint | tools.inspect_checkpoint | list, verify and compare checkpoints
merge              | tools.merge_datasets     | join several token files into one
split              | tools.split_dataset      | cut one token file into several
audit              | tools.audit_data         | count whether a run drew each token exactly once
import             | tools.import_hf          | make a checkpoint of a Hugging Face folder
export             | tools.export_hf          | make a Hugging Face folder of a checkpoint
generate           | tools.generate           | continue texts with a checkpoint or a Hugging Face folder
evaluate           | tools.evaluate           | measure a model at long contexts: probes, RULER, lm-eval
coordinate-check   | tools.coordinate_check   | check muP: train a model at several widths, or sweep rates
report             | tools.report             | show a run on one page
watch              | tools.watch              | see in the terminal what a run is doing: DIR
bench              | tools.bench              | compare this code with its peers on this machine
TABLE
}

names() { commands | cut -d ' ' -f 1; }

# Who or what runs the command $1; nothing for an unknown one.
runner_of() { commands | awk -F ' *[|] *' -v name="$1" '$1 == name { print $2 }'; }

list_commands() {
  echo "usage: bash launch/ithaca.sh COMMAND [ARGUMENTS]"
  echo
  commands | awk -F ' *[|] *' '{ printf "  %-19s %s\n", $1, $3 }'
  echo
  echo "bash launch/ithaca.sh COMMAND --help lists a command's arguments."
}

# The command that is spelled most like $1; nothing without a Python to ask.
nearest() {
  local script='
import difflib, sys
word, *known = sys.argv[1:]
print(*difflib.get_close_matches(word, known, n=1, cutoff=0.5))'
  # shellcheck disable=SC2046  # one word per name
  "${ITHACA_PYTHON:-python3}" -I -S -c "$script" "$1" $(names) 2>/dev/null
}

refuse() {
  printf 'ithaca.sh: error: %s\n' "$*" >&2
  exit 2
}

refuse_unknown() {
  local match
  match=$(nearest "$1")
  refuse "$1: no such command. Fix: ${match:+$match, or }one of $(names | paste -sd ' ' -)"
}

# Check a run and estimate it, as many processes as train.sh would start; --world-size is for other
# machines.
plan() {
  # shellcheck source=launch/devices.sh
  . "$root/launch/devices.sh"
  # shellcheck source=launch/environment.sh
  . "$root/launch/environment.sh" || exit 1
  local processes=${NPROC_PER_NODE:-$(count_gpus)}
  local nodes=${NNODES:-1}
  [[ $processes != 0 ]] || processes=1
  [[ $processes =~ ^[1-9][0-9]*$ && $nodes =~ ^[1-9][0-9]*$ ]] ||
    refuse "NNODES = $nodes, NPROC_PER_NODE = $processes: must be whole numbers, at least 1"
  LOCAL_WORLD_SIZE=$processes WORLD_SIZE=$((nodes * processes)) \
    exec "$PYTHON" -m tools.plan "$@"
}

case ${1-} in
  "")
    list_commands
    exit 2 ;;
  -h | --help | help)
    list_commands
    exit 0 ;;
esac

command=$1
runner=$(runner_of "$command")
[[ -n $runner ]] || refuse_unknown "$command"
shift

# Each `exec` replaces this script, so that signals reach the command and its exit code the caller.
case $runner in
  train.sh) exec bash "$root/launch/train.sh" "$@" ;;
  plan) plan "$@" ;;
esac
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh" || exit 1
exec "$PYTHON" -m "$runner" "$@"
