"""The door of the trainer: bad input is refused before any process group is made, and the launcher
is told."""

import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from pretrain.train import main
from tests.dist.training import VOCABULARY, base_arguments, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus", documents=20)


def refused(argv, capsys, monkeypatch, tmp_path, world=1) -> str:
    """Run main, check that it refuses in an orderly way -> what it printed."""
    outcome = tmp_path / "outcome"
    monkeypatch.setenv("ITHACA_OUTCOME_FILE", str(outcome))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    assert main(argv) == 0, (
        "the launcher reads the outcome; exit code 2 would only add torchrun's traceback"
    )
    assert outcome.read_text() == "refused" and not dist.is_initialized()
    text = capsys.readouterr().err
    assert text and all(line.startswith("error: ") for line in text.splitlines())
    return text


@pytest.mark.parametrize(
    "overrides, world, message",
    [
        (dict(tensor_model_parallel_size=2), 3, "world size = 3: must be a multiple of"),
        (
            dict(tensor_model_parallel_size=8),
            8,
            "must divide num_attention_heads = 4. Fix: one of [1, 2, 4]",
        ),
        (dict(pipeline_model_parallel_size=4), 4, "each stage needs at least one of the 2 layers"),
        (dict(context_parallel_size=8), 8, "Ulysses gives each rank at least one of the 4"),
        (
            dict(global_batch_size=3),
            2,
            "global_batch_size = 3: must be a multiple of micro_batch_size x data-parallel",
        ),
        (
            dict(load="/nonexistent/run"),
            1,
            "load = /nonexistent/run: no checkpoint is published there",
        ),
        (dict(vocab_size=50), 1, "holds token id"),
        (dict(tokenizer_type="SentencePieceTokenizer"), 1, "tokenizer_model = None: must be given"),
        (dict(lr=-1), 1, "lr = -1.0: must be above 0"),
        (
            dict(max_position_embeddings=32),
            1,
            "seq_length = 64: beyond max_position_embeddings = 32",
        ),
        (dict(unknown_flag=1), 1, "--unknown-flag: no such flag"),
        (dict(lr="fast"), 1, "command line: lr = 'fast': must be a number"),
        (dict(num_layers=1.5), 1, "command line: num_layers = '1.5': must be a whole number"),
        (dict(lr="inf"), 1, "lr = inf: must be a finite number"),
        (dict(save="/proc/ithaca"), 1, "save = /proc/ithaca: cannot be written"),
        (dict(save=__file__), 1, "cannot be written"),
        (
            dict(eval_seq_lengths=33, context_parallel_size=2),
            2,
            "phase 'main': eval_seq_lengths = 33: the 1 x 33 tokens of a microbatch must be a "
            "multiple of 2",
        ),
        (
            dict(eval_passkey_lengths=64),
            1,
            "eval_passkey_lengths = 64: asks in words, and NullTokenizer has no text",
        ),
    ],
)
def test_refusals(corpus, capsys, monkeypatch, tmp_path, overrides, world, message):
    text = refused(base_arguments(corpus, **overrides), capsys, monkeypatch, tmp_path, world)
    assert message in text and " Fix: " in text


def test_damaged_data(corpus, capsys, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    for end in ("bin", "idx"):
        (tmp_path / f"broken.{end}").write_bytes(open(f"{corpus}.{end}", "rb").read())
    with open(f"{broken}.bin", "r+b") as file:
        file.truncate(100)
    assert "truncated" in refused(base_arguments(str(broken)), capsys, monkeypatch, tmp_path)
    assert "no such file" in refused(
        base_arguments(str(tmp_path / "none")), capsys, monkeypatch, tmp_path
    )


def test_tensorboard_is_optional(corpus, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = refused(base_arguments(corpus, tensorboard_dir="logs"), capsys, monkeypatch, tmp_path)
    assert "tensorboard_dir = logs: needs the package tensorboard. Fix: install it" in text


def test_several_problems_at_once(corpus, capsys, monkeypatch, tmp_path):
    text = refused(
        base_arguments(corpus, lr=-1, clip_grad=-1, num_query_groups=3),
        capsys,
        monkeypatch,
        tmp_path,
    )
    assert len(text.splitlines()) == 4  # min_lr exceeds a negative lr


def test_phases_that_change_the_layout_need_a_save_folder(corpus, capsys, monkeypatch, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "phases:\n  - {name: a, seq_length: 64, train_tokens: 1K, global_batch_tokens: 128}\n"
        "  - {name: b, seq_length: 64, train_tokens: 1K, global_batch_tokens: 128, "
        "context_parallel_size: 2}\n"
    )
    argv = base_arguments(corpus)
    at = argv.index("--train-iters")
    argv = ["--config", str(config), *argv[:at], *argv[at + 2 :]]
    assert "save: phases with different layouts" in refused(
        argv, capsys, monkeypatch, tmp_path, world=2
    )
    assert "no_save_optim = True: phases with different layouts hand the optimizer over" in refused(
        [*argv, "--no-save-optim"], capsys, monkeypatch, tmp_path, world=2
    )


def test_without_a_launcher_bad_input_exits_with_2(corpus, capsys):
    assert main(base_arguments(corpus, lr=-1)) == 2
    assert "lr = -1.0" in capsys.readouterr().err


def test_a_machine_of_its_own_says_its_name(corpus, capsys, monkeypatch):
    """A file that is missing on node 1 only: rank 0 sees nothing wrong, so node 1 must speak."""
    for name, value in (("RANK", "8"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "16")):
        monkeypatch.setenv(name, value)
    assert main(base_arguments("/nowhere/corpus", global_batch_size=16)) == 2
    assert capsys.readouterr().err.startswith("error (rank 8 on ")


def test_a_rank_that_refuses_alone_speaks_and_ends_the_others(
    corpus, capsys, tmp_path, monkeypatch
):
    outcome = tmp_path / "outcome"
    for name, value in (
        ("RANK", "1"),
        ("LOCAL_RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("ITHACA_OUTCOME_FILE", str(outcome)),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pretrain.processes.outcome.was_refused_by_others", lambda: False)
    assert main(base_arguments(corpus, lr=-1)) == 2
    assert "error (rank 1 on " in capsys.readouterr().err and outcome.read_text() == "refused"
    monkeypatch.undo()


def test_a_rank_that_refuses_like_the_others_is_silent(corpus, capsys, tmp_path, monkeypatch):
    outcome = tmp_path / "outcome"
    outcome.write_text("refused")  # by local rank 0
    for name, value in (
        ("RANK", "1"),
        ("LOCAL_RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("ITHACA_OUTCOME_FILE", str(outcome)),
    ):
        monkeypatch.setenv(name, value)
    assert main(base_arguments(corpus, lr=-1)) == 0 and capsys.readouterr().err == ""


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path):
    from data.config import DataConfig
    from data.sources import open_corpus
    from data.writers.indexed_writer import IndexedWriter

    with IndexedWriter(str(tmp_path / "c"), np.uint16) as writer:
        for _ in range(5):
            writer.add_document([1, 2, 3])
        writer.finish({"type": "SentencePieceTokenizer", "vocab_size": 9, "fingerprint": "aa"})
    config = DataConfig(data_path=[str(tmp_path / "c")])
    assert open_corpus(
        config, 1, 9, {"type": "SentencePieceTokenizer", "vocab_size": 9, "fingerprint": "aa"}
    )
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        open_corpus(
            config, 1, 9, {"type": "SentencePieceTokenizer", "vocab_size": 9, "fingerprint": "bb"}
        )


@pytest.mark.parametrize("kind", ["none", "absent", "of another corpus", "damaged"])
def test_a_corpus_whose_tokenizer_is_unknown_is_named_and_a_damaged_record_refused(tmp_path, kind):
    from data.config import DataConfig
    from data.ledger import Ledger
    from data.sources import Corpus, open_corpus
    from data.writers.indexed_writer import IndexedWriter
    from pretrain.plan_warnings import _warnings_of_data

    prefix = str(tmp_path / "c")
    side = tmp_path / "c.json"
    theirs = {"type": "SentencePieceTokenizer", "vocab_size": 9, "fingerprint": "aa"}
    ours = theirs | {"fingerprint": "bb"}
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([1, 2, 3])
        writer.finish(None if kind == "none" else theirs)
    if kind == "absent":
        side.unlink()
    elif kind == "of another corpus":
        side.write_text(side.read_text().replace('"tokens": 3', '"tokens": 4'))
    elif kind == "damaged":
        side.write_text("{")
    config = DataConfig(data_path=[prefix])
    if kind == "damaged":
        with pytest.raises(ValueError, match="c.json: damaged"):
            open_corpus(config, 1, 9, ours)
        return
    assert open_corpus(config, 1, 9, ours).unknown_tokenizers == [prefix]
    plan: Any = SimpleNamespace(
        has_data=True,
        corpus=Corpus({}, {}, unknown_tokenizers=[prefix]),
        ledger=Ledger({}),
        forecast=[],
        phases=[],
    )
    (line,) = _warnings_of_data(plan)
    assert line.startswith(f"{prefix}: no .json beside it says which tokenizer made it")
    plan.corpus.unknown_tokenizers.extend(["b", "c"])
    (line,) = _warnings_of_data(plan)
    assert line.startswith(f"{prefix} and 2 other corpora: no .json")
    # Without a tokenizer of its own, or with bare ids, a run has nothing to compare.
    bare = {"type": "NullTokenizer", "vocab_size": 9, "fingerprint": "cc"}
    for described in (None, bare):
        assert open_corpus(config, 1, 9, described).unknown_tokenizers == []


def test_print_config_shows_the_resolved_run_and_trains_nothing(corpus, capsys):
    assert main([*base_arguments(corpus), "--print-config"]) == 0
    text = capsys.readouterr().out
    assert (
        f"vocab_size: {VOCABULARY}" in text
        and "hidden_size: 32" in text
        and not dist.is_initialized()
    )


def test_one_process_without_a_launcher_trains(corpus, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ITHACA_OUTCOME_FILE", str(tmp_path / "outcome"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    argv = base_arguments(
        corpus, save=str(tmp_path / "save"), train_iters=2, log_interval=1, wandb_project="test"
    )
    try:
        assert main(argv) == 0
    finally:
        import torch.distributed.tensor.debug as debug

        debug._clear_sharding_prop_cache()
    assert (tmp_path / "outcome").read_text() == "done"
    out = capsys.readouterr().out
    assert "step      2 | main 64" in out and "ETA" in out and "evaluation at step 0" in out
    assert list((tmp_path / "save" / "wandb").glob("offline-run-*"))


def test_a_tokenizer_that_is_deleted_while_a_run_trains_is_saved(corpus, tmp_path, monkeypatch):
    """It may lie in another run's checkpoint, which that run deletes."""
    from data.tokenizers.tokenizer import NullTokenizer
    from pretrain.logs.console import Console

    file = tmp_path / "words.model"
    file.write_bytes(b"words")
    files = property(lambda _: [str(file)], lambda *_: None)
    monkeypatch.setattr(NullTokenizer, "files", files, raising=False)
    monkeypatch.setattr(Console, "step", lambda *_: file.unlink(missing_ok=True))
    save = tmp_path / "save"
    assert main(base_arguments(corpus, save=str(save), train_iters=1, eval_iters=0)) == 0
    assert not file.exists()
    assert (save / "iter_0000001" / "tokenizer" / "words.model").read_bytes() == b"words"


def test_who_reads_the_first_lines_of_the_help_only_gets_no_error():
    asked = subprocess.Popen(
        [sys.executable, "-m", "pretrain.train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert asked.stdout is not None and asked.stderr is not None
    asked.stdout.close()
    said = asked.stderr.read()
    assert asked.wait(60) == -signal.SIGPIPE, said
    assert "rror" not in said
