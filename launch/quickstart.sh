#!/usr/bin/env bash
# From nothing to a trained model on this machine, with real text, on GPUs or on the CPU:
#
#   bash launch/quickstart.sh            train on Python's own standard library
#   bash launch/quickstart.sh CORPUS     train on your text: a file or a folder
#
# Of .jsonl files each line's "text" is read.
#
# Everything goes to runs/quickstart (or the folder QUICKSTART_DIR). Run it again to go on where it
# ended: finished steps are skipped, training continues from its last checkpoint.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
run=${QUICKSTART_DIR:-$root/runs/quickstart}
source_path=${1:-}
script=quickstart
steps=8
advice="Give another folder: QUICKSTART_DIR=FOLDER"

if [[ $# -gt 1 || $source_path == -* ]]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
  exit 2
fi

mkdir -p "$run"
run=$(cd "$run" && pwd -P)
if [[ ! -f $run/corpus.origin && -n $(ls -A "$run") ]]; then
  echo "quickstart: $run is not empty, and this script did not make it. $advice" >&2
  exit 2
fi

# shellcheck source=launch/steps.sh
. "$root/launch/steps.sh"
# shellcheck source=launch/devices.sh
. "$root/launch/devices.sh"

begin "setup: the Python environment"
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh" || fail "see the message above"
echo "      $("$PYTHON" --version) at $PYTHON"

begin "corpus: the text, a document per file"
if [[ -n $source_path ]]; then
  [[ -e $source_path ]] || fail "$source_path does not exist" 2
  origin=$(cd "$(dirname "$source_path")" && pwd -P)/$(basename "$source_path")
else
  origin=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
fi
if [[ -f $run/corpus.origin ]]; then
  before=$(<"$run/corpus.origin")
  [[ $before == "$origin" ]] ||
    fail "$run was made from $before, not from $origin. $advice" 2
fi
printf '%s\n' "$origin" >"$run/corpus.origin"
if [[ -n $source_path ]]; then
  corpus=$origin
  echo "      $corpus"
elif corpus=$run/corpus.jsonl && [[ -f $corpus ]]; then
  skip "$corpus"
else
  attempt "$PYTHON" - "$origin" "$corpus" <<'PYTHON' || fail "see the message above"
import json
import os
import sys
from pathlib import Path

origin, output = sys.argv[1:]
# No installed packages, and no tests: they repeat the code they test.
left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
temporary = f"{output}.{os.getpid()}"
documents = size = 0
with open(temporary, "w", encoding="utf-8") as out:
    for folder, folders, names in os.walk(origin):
        folders[:] = sorted(set(folders) - left_out)
        for file in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            try:
                text = file.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # a few files are in other encodings
            if text.strip():
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                documents, size = documents + 1, size + len(text)
os.replace(temporary, output)
print(f"      {documents:,} files, {size / 1e6:.1f} MB from {origin}")
PYTHON
fi

# Finished steps leave a file here, so that what an interruption left is made again.
finished=$run/.finished
mkdir -p "$finished" "$run/tokenizer" "$run/data"

begin "tokenizer: SentencePiece, 8,192 pieces"
tokenizer=$run/tokenizer/spm.model
if [[ -f $finished/tokenizer && -f $tokenizer ]]; then
  skip "$tokenizer"
else
  rm -f "$finished"/* "$run"/tokenizer/spm.*
  ithaca train-tokenizer --input "$corpus" --vocab-size 8192 \
    --output-prefix "$run/tokenizer/spm" || fail "see the message above"
  touch "$finished/tokenizer"
fi

begin "tokens: the corpus as .bin and .idx"
if [[ -f $finished/data && -f $run/data/corpus.idx ]]; then
  skip "$run/data/corpus.idx"
else
  rm -f "$run"/data/corpus*
  ithaca preprocess --input "$corpus" --output-prefix "$run/data/corpus" --append-eod \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$tokenizer" --workers 2 \
    --skip-bad-lines || fail "see the message above"
  touch "$finished/data"
fi
data=$run/data/corpus

choose_devices
config=$root/launch/configs/quickstart.yaml
if [[ $processes -eq 1 ]]; then config=$root/launch/configs/quickstart-1gpu.yaml; fi
begin "training: $where, $(basename "$config")"
NPROC_PER_NODE=$processes ithaca train --config "$config" "$precision" \
  --data-path "$data" --tokenizer-model "$tokenizer" --save "$run/checkpoints" ||
  fail "see the messages above" $?

begin "export: to Hugging Face, and the proof that it is the same model"
iteration=$(head -n 1 "$run/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null) ||
  fail "training published no checkpoint"
exported=$(cat "$finished/export" 2>/dev/null || true)
if [[ $exported == "$iteration" && -f $run/huggingface/config.json ]]; then
  skip "$run/huggingface"
else
  rm -f "$finished/export"
  ithaca export --load "$run/checkpoints" --output "$run/huggingface" --overwrite --verify ||
    fail "see the message above"
  printf '%s\n' "$iteration" >"$finished/export"
fi

begin 'sample: what follows "def "'
ithaca generate --load "$run/huggingface" --prompt "def " || fail "see the message above"

begin "report: the run on one page"
ithaca report --load "$run/checkpoints" --output "$run/report.html" >"$run/summary.txt" ||
  fail "see the message above"
echo "      $run/report.html"

printf '\nDone in %d:%02d.\n\n' $((SECONDS / 60)) $((SECONDS % 60))
grep -v '^wrote ' "$run/summary.txt" | sed 's/^/  /'
cat <<SUMMARY

  checkpoints    $run/checkpoints
  Hugging Face   $run/huggingface
  report         $run/report.html
  every step     $run/checkpoints/metrics.jsonl
  tokenizer      $tokenizer
  tokens         $data.bin, .idx

  The run's settings are in launch/configs/$(basename "$config").
SUMMARY
