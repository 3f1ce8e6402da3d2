#!/usr/bin/env bash
# Continued pretraining, end to end: take a Hugging Face folder, train it on at 16K tokens of
# context, and get a Hugging Face folder out that is verified.
#
#   bash launch/extend.sh                          the quick start's model and corpus, 2K -> 16K
#   bash launch/extend.sh HF_FOLDER CORPUS.jsonl   your own
#
# The model is a Llama, Qwen2 or Qwen3 of 2K tokens; for one of another context change
# original_max_position_embeddings in launch/configs/extend.yaml.
#
# Everything goes to runs/extend (or the folder EXTEND_DIR). Run it again to go on where it ended.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
quickstart=${QUICKSTART_DIR:-$root/runs/quickstart}
model=${1:-$quickstart/huggingface}
corpus=${2:-$quickstart/corpus.jsonl}
script=extend
steps=7

refuse() {
  echo "extend: $*" >&2
  exit 2
}

if [[ $# -gt 2 || ${1:-} == -* ]]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
  exit 2
fi
for needed in "$model/config.json" "$corpus"; do
  if [[ ! -f $needed ]]; then
    refuse "$needed does not exist." \
      "Run bash launch/quickstart.sh first, or name a Hugging Face folder and a corpus."
  fi
done
run=${EXTEND_DIR:-$root/runs/extend}
mkdir -p "$run"
run=$(cd "$run" && pwd -P)
model=$(cd "$model" && pwd -P)
corpus=$(cd "$(dirname "$corpus")" && pwd -P)/$(basename "$corpus")
if [[ ! -f $run/origin && -n $(ls -A "$run") ]]; then
  refuse "$run is not empty, and this script did not make it." \
    "Give another folder: EXTEND_DIR=FOLDER"
fi
if [[ -f $run/origin && $(<"$run/origin") != "$model $corpus" ]]; then
  refuse "$run was made from $(<"$run/origin"). Give another folder: EXTEND_DIR=FOLDER"
fi
printf '%s\n' "$model $corpus" >"$run/origin"

# shellcheck source=launch/steps.sh
. "$root/launch/steps.sh"
# shellcheck source=launch/devices.sh
. "$root/launch/devices.sh"

begin "setup: the Python environment"
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh" || fail "see the message above"

begin "import: the Hugging Face model as a checkpoint"
if [[ -f $run/imported/latest_checkpointed_iteration.txt ]]; then
  skip "$run/imported"
else
  ithaca import --hf "$model" --save "$run/imported" || fail "see the message above"
fi

begin "tokens: the corpus in the model's own tokenizer"
data=$run/data/corpus
if [[ -f $run/.data ]]; then
  skip "$data.idx"
else
  mkdir -p "$run/data"
  ithaca preprocess --input "$corpus" --output-prefix "$data" --append-eod --workers 2 \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$model" --skip-bad-lines --overwrite ||
    fail "see the message above"
  touch "$run/.data"
fi

choose_devices
begin "training: $where, 2K -> 16K, on documents of at least 4K tokens"
NPROC_PER_NODE=$processes ithaca train --config "$root/launch/configs/extend.yaml" "$precision" \
  --pretrained-checkpoint "$run/imported" --tokenizer-model "$model" --save "$run/checkpoints" \
  --data-path "${data}[4Ki:]" || fail "see the messages above" $?

begin "export: to Hugging Face, and the proof that it is the same model"
ithaca export --load "$run/checkpoints" --output "$run/huggingface" --overwrite --verify ||
  fail "see the message above"
"$PYTHON" - "$run/huggingface/config.json" <<'PYTHON'
import json
import sys

config = json.load(open(sys.argv[1], encoding="utf-8"))
context = config["max_position_embeddings"]
print(f"      max_position_embeddings {context:,}, rope {config['rope_parameters']}")
PYTHON

begin "data: was each token drawn once?"
ithaca audit --load "$run/checkpoints" || fail "see the message above"

begin "report: what the longer context is worth"
ithaca report --load "$run/checkpoints" --output "$run/report.html" || fail "see the message above"

printf '\nDone in %d:%02d.\n\n' $((SECONDS / 60)) $((SECONDS % 60))
cat <<SUMMARY
  Hugging Face   $run/huggingface
  report         $run/report.html
  checkpoints    $run/checkpoints

  The run's settings are in launch/configs/extend.yaml.
SUMMARY
