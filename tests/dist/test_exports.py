"""Runs that export their checkpoints to Hugging Face's format while they train."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from parallel.layout import World
from pretrain.checkpointing import exports
from pretrain.checkpointing.exports import PENDING
from pretrain.checkpointing.folders import complete_steps
from pretrain.checkpointing.stored_tensors import read_whole_tensors
from tests.dist.training import VOCABULARY, base_arguments, losses, train, write_corpus
from tests.huggingface.imports import checkpoint_logits
from tools.huggingface.stored_model import open_stored_model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def events(save: Path, kind: str) -> list[int]:
    found = [json.loads(line) for line in (save / "events.jsonl").read_text().splitlines()]
    return [event["step"] for event in found if event["event"] == kind]


def phases_file(folder: Path) -> Path:
    """Two phases, of 3 and 4 steps."""
    file = folder / "phases.yaml"
    file.write_text(
        "phases:\n"
        "  - {name: base, seq_length: 64, train_tokens: 768}\n"
        "  - {name: long, seq_length: 128, train_tokens: 1024}\n"
    )
    return file


def arguments(corpus: str, folder: Path, **more) -> list[str]:
    argv = base_arguments(corpus, eval_iters=0, save=str(folder / "save"), **more)
    for name in ("--train-iters", "--global-batch-size"):
        at = argv.index(name)
        del argv[at : at + 2]
    tokens = ["--global-batch-tokens", "256", "--micro-batch-size", "1"]
    return [*argv, *tokens, "--config", str(phases_file(folder))]


def assert_is_checkpoint(save: Path, step: int) -> None:
    """Assert that transformers' logits of an export are those of our model in the checkpoint."""
    from transformers import AutoModelForCausalLM

    folder = save / "hf" / f"step_{step:08d}"
    ids = torch.arange(60) % VOCABULARY
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(input_ids=ids[None]).logits[0]
    ours = checkpoint_logits(open_stored_model(str(save), step), folder, ids, torch.arange(60))
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_run_exports_at_the_ends_of_phases(pool, corpus, tmp_path):
    argv = arguments(
        corpus, tmp_path, hf_export_phase_ends=True, keep_last=1, tensor_model_parallel_size=2
    )
    assert pool.run(train, 2, argv) == ["done"] * 2
    save = tmp_path / "save"
    assert events(save, "export") == [3, 7]
    assert sorted(path.name for path in (save / "hf").iterdir()) == ["step_00000003", "step_00000007"]
    assert json.loads((save / "hf/step_00000003/config.json").read_text())["torch_dtype"] == "bfloat16"
    for step in (3, 7):
        assert_is_checkpoint(save, step)


@pytest.mark.long
def test_a_run_exports_at_steps_and_keeps_their_checkpoints_until_then(pool, corpus, tmp_path):
    from transformers import AutoModelForCausalLM

    argv = arguments(
        corpus,
        tmp_path,
        save_interval=1,
        keep_last=1,
        hf_export_interval=2,
        hf_export_dtype="float32",
    )
    assert pool.run(train, 2, argv) == ["done"] * 2
    save = tmp_path / "save"
    assert events(save, "export") == [2, 3, 4, 6, 7] and events(save, "export failed") == []
    assert json.loads((save / PENDING).read_text()) == {}
    # Most of the checkpoints are gone by now.
    assert complete_steps(save) == [7, 3]
    for step in (3, 7):
        assert_is_checkpoint(save, step)
    # Each is of its own step.
    embeddings = [
        AutoModelForCausalLM.from_pretrained(save / "hf" / f"step_{step:08d}")
        .get_input_embeddings()
        .weight
        for step in (2, 4, 6)
    ]
    assert not torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[1], embeddings[2])


def train_and_kill_exports(world: World, argv: list[str]) -> str:
    """A run whose exports are killed as soon as they begin to write, but for that of step 3."""
    start = exports.Exporter._start

    def start_and_kill(self, step, output, said):
        process = start(self, step, output, said)
        if step != 3:
            threading.Thread(target=kill_when_it_writes, args=(process.pid, output)).start()
        return process

    with mock.patch.object(exports.Exporter, "_start", start_and_kill):
        return train(world, argv)


def kill_when_it_writes(pid: int, output: Path) -> None:
    partial = output.with_name(f".{output.name}.partial")
    while not partial.exists():
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.long
def test_killed_exports_change_nothing_of_the_run_and_leave_no_half_folder(pool, corpus, tmp_path):
    argv = arguments(corpus, tmp_path, save_interval=1, hf_export_interval=2)
    assert pool.run(train_and_kill_exports, 2, argv) == ["done"] * 2
    save = tmp_path / "save"
    assert events(save, "export failed") == [2, 4, 6, 7] and events(save, "export") == [3]
    assert [path.name for path in (save / "hf").iterdir()] == ["step_00000003"]

    (tmp_path / "other").mkdir()
    argv = arguments(corpus, tmp_path / "other", save_interval=1)
    assert pool.run(train, 2, argv) == ["done"] * 2
    assert losses(save) == losses(tmp_path / "other" / "save")


@pytest.mark.long
def test_a_restart_exports_what_a_stop_cut_short(pool, corpus, tmp_path):
    argv = arguments(corpus, tmp_path, save_interval=1, hf_export_interval=2, keep_last=1)
    with_stop = [*argv, "--exit-interval", "2"]
    assert pool.run(train_and_leave_at_once, 2, with_stop) == ["stopped"] * 2
    save = tmp_path / "save"
    assert events(save, "export left") == [2] and events(save, "export") == []
    assert not any((save / "hf").glob("*")) and 2 in complete_steps(save)
    assert pool.run(train, 2, argv) == ["done"] * 2
    assert events(save, "export") == [2, 3, 4, 6, 7]


def train_and_leave_at_once(world: World, argv: list[str]) -> str:
    """A run that waits for no export when it stops."""
    with mock.patch.object(exports, "STOP_SECONDS", 0.0):
        return train(world, argv)
