"""progress.json: what an older version wrote still loads, and what is written is read again."""

import dataclasses
import json

import pytest

from data.ledger import Ledger
from pretrain.checkpointing.progress import Progress, StepCounts, ValidationScore

# Written by a version that did not count steps with targets, nor know of evaluations that are due.
OLD = """{
 "step": 4, "clock": 1024, "real_tokens": 1024, "skipped_in_a_row": 0, "wandb_run_id": null,
 "phase": {
  "name": "main", "index": 0, "start": 0, "end": 1024, "tokens": 1024, "seq_length": 64,
  "global_batch_tokens": 256, "stretches": [[0, 1024, 256]], "micro_batch_size": 1,
  "layout": {"layout": "given", "tensor_model_parallel_size": 1, "context_parallel_size": 1},
  "memory": {"recompute_granularity": null, "mlp_tiles": 1, "loss_chunk_tokens": 2048},
  "rope": {
   "base": 10000.0, "type": "default", "factor": null, "original_max_position_embeddings": null,
   "low_freq_factor": null, "high_freq_factor": null, "beta_fast": null, "beta_slow": null,
   "attention_factor": null, "mscale": null, "mscale_all_dim": null, "truncate": null
  },
  "document_masking": true, "packing": "concat", "data_path": ["corpus"],
  "data_exhausted": "repeat", "lr": 0.01, "min_lr": 0.0, "lr_schedule": "continue",
  "lr_warmup_tokens": 0, "auto": [], "predicted_bytes": null
 },
 "last_batch_tokens": 256, "longest_seq_length": 64, "seed": 1234, "layouts": {},
 "data": {
  "sources": {
   "corpus": {
    "corpus": "2f46a5c686c2f5f08f4db966905a73f8", "documents": 193, "tokens": 11351,
    "selection": "fef1159285080476d1771441434a3221"
   }
  },
  "segments": [
   {
    "start": 0, "phase": "main", "seq_length": 64, "blend": [[11351.0, "corpus"]],
    "packing": "concat", "exhausted": "repeat", "fills": {"corpus": 1.0}, "at": 1024,
    "so_far": {
     "corpus": {"samples": 16, "tokens": 1024, "documents": 15, "epochs": 0.0902123160954982}
    }
   }
  ],
  "account": [
   {
    "phase": "main", "source": "corpus", "skipped": false, "samples": 16, "tokens": 1024,
    "documents": 15, "epochs": 0.0902123160954982
   }
  ]
 },
 "tokenizer": {
  "type": "NullTokenizer", "vocab_size": 97, "fingerprint": "99aa06d3014798d86001c324468d497f"
 },
 "has_optimizer": true, "world_size": 1, "threads": 1
}"""


def test_an_old_checkpoint_is_completed(tmp_path):
    (tmp_path / "progress.json").write_text(OLD)
    progress = Progress.read(tmp_path)
    assert (progress.step, progress.clock, progress.last_step_clock) == (4, 1024, 768)
    assert progress.steps_of_run == progress.steps_of_phase == StepCounts(4, 4, 4)
    assert (progress.run_id, progress.ends_phase, progress.validation) == (None, False, None)
    assert progress.evaluation_due is None
    assert progress.rope.base == 10000.0


def test_the_ledger_of_an_old_checkpoint_is_read():
    ledger = Ledger({}, Progress.from_json(json.loads(OLD)).data, accept_changes=True)
    (segment,) = ledger.to_json(1024)["segments"]
    assert segment == json.loads(OLD)["data"]["segments"][0]


def test_what_is_written_is_read_again():
    progress = Progress.from_json(json.loads(OLD))
    written = json.loads(progress.to_text())
    assert Progress.from_json(written) == progress
    assert written.items() >= json.loads(OLD).items()


def test_counts_and_scores_are_read_again():
    progress = dataclasses.replace(
        Progress.from_json(json.loads(OLD)),
        steps_of_run=StepCounts(4, 3, 2),
        steps_of_phase=StepCounts(2, 1, 0),
        validation=ValidationScore("valid", 128, 2.5),
    )
    assert Progress.from_json(json.loads(progress.to_text())) == progress


def test_an_old_run_without_a_target_is_still_one():
    progress = Progress.from_json(json.loads(OLD) | {"steps_with_targets": 0})
    assert progress.steps_of_phase.with_targets == 0


def test_what_every_version_writes_must_be_there():
    content = json.loads(OLD)
    del content["clock"]
    with pytest.raises(ValueError, match=r"progress.json: is not one of ours \(.*'clock'\)"):
        Progress.from_json(content)
