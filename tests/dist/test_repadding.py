"""A checkpoint with other rows of padding in its vocabulary trains on as if nothing had changed."""

from pathlib import Path

import numpy as np
import pytest

from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.plan import make_plan
from pretrain.checkpointing.setting_changes import vocabulary_changes
from tests.dist.training import VOCABULARY, base_arguments, losses, refusal, stored, train
from tests.dist.training import write_corpus
from tests.huggingface.model_folders import write_folder
from tools import import_hf

TABLES = ("embedding.weight", "output.weight")
TIED = dict(untie_embeddings_and_output_weights=False)
UNTIED = dict(untie_embeddings_and_output_weights=True)
TENSOR_PARALLEL = dict(tensor_model_parallel_size=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.mark.parametrize(
    "model, multiples, world, layout",
    [
        # 97 rows: tp 2 does not divide them, so that the run must pad in another way to split them
        (UNTIED, (1, 2), 2, TENSOR_PARALLEL),
        (TIED, (1, 128), 1, {}),
        pytest.param(
            TIED, (128, 98), 2, dict(pipeline_model_parallel_size=2), marks=pytest.mark.long
        ),
        # tp ranks that hold nothing but padding
        pytest.param(
            UNTIED, (1, 400), 4, dict(tensor_model_parallel_size=4), marks=pytest.mark.long
        ),
        pytest.param(UNTIED, (128, 1), 4, dict(context_parallel_size=2), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_training_goes_on_with_other_padding(
    pool, corpus, tmp_path, model, multiples, world, layout
):
    before, after = multiples
    straight = str(tmp_path / "straight")
    save = str(tmp_path / "save")
    common = dict(fp64=True, bf16=False) | model
    pool.run(
        train,
        1,
        base_arguments(corpus, save=straight, make_vocab_size_divisible_by=before, **common),
    )
    first = base_arguments(
        corpus, save=save, make_vocab_size_divisible_by=before, exit_interval=3, **common
    )
    assert pool.run(train, 1, first) == ["stopped"]
    second = base_arguments(
        corpus, save=save, make_vocab_size_divisible_by=after, **(common | layout)
    )
    assert pool.run(train, world, second) == ["done"] * world
    found = losses(save)
    expected = losses(straight)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    worst = max(abs(found[step] - expected[step]) for step in expected)
    assert worst < 1e-12, (found, expected)
    check_tensors(stored(straight), stored(save), after)


def check_tensors(expected: dict, found: dict, multiple: int) -> None:
    """Assert equal rows of real tokens, and padding whose moments are zero."""
    assert expected.keys() == found.keys()
    rows = -(-VOCABULARY // multiple) * multiple
    for name, tensor in expected.items():
        other = found[name]
        if name.split(".", 1)[1].startswith(TABLES) and tensor.ndim == 2:
            assert other.shape[0] == rows, (name, other.shape)
            if name.startswith("optimizer."):
                assert not other[VOCABULARY:].any(), name
            tensor = tensor[:VOCABULARY]
            other = other[:VOCABULARY]
        assert np.allclose(tensor, other, rtol=1e-9, atol=1e-12), name


def train_imported(pool, folder: Path, corpus: str, at_import: int, at_start: int | None, tp: int):
    """Import with a padding, train 2 steps with another -> the losses."""
    place = folder.parent / f"{at_import} {at_start} {tp}"
    padding = ["--make-vocab-size-divisible-by", str(at_import)]
    imported = str(place / "imported")
    words = ["--hf", str(folder), "--save", imported, "--no-verify", *padding]
    assert import_hf.main(words) == 0
    argv = [
        *["--use-checkpoint-args", "--pretrained-checkpoint", imported],
        *["--save", str(place / "run"), "--data-path", corpus, "--tokenizer-type", "NullTokenizer"],
        *"--seq-length 64 --fp64 --global-batch-size 4 --train-iters 2 --lr 1e-2".split(),
        *f"--eval-iters 1 --no-bf16 --lr-decay-style constant".split(),
        *["--tensor-model-parallel-size", str(tp)],
    ]
    if at_start is not None:
        argv += ["--make-vocab-size-divisible-by", str(at_start)]
    assert pool.run(train, tp, argv) == ["done"] * tp
    return losses(str(place / "run"))


@pytest.mark.parametrize(
    "heads, paddings, tp",
    [
        # 3 does not divide 128 rows
        ((6, 3), [(128, 6), (3, None)], 3),
        pytest.param((4, 2), [(1, 4), (7, 4), (256, None)], 4, marks=pytest.mark.long),
    ],
    ids=["tp 3", "tp 4"],
)
def test_an_imported_model_trains_with_a_tensor_parallelism_that_its_padding_stops(
    pool, corpus, tmp_path, heads, paddings, tp
):
    """Another padding, at the start or at the import, changes no loss."""
    shape = dict(vocab_size=VOCABULARY, hidden_size=24)
    shape |= dict(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    folder = write_folder(tmp_path / "hf", "llama", **shape)
    expected = train_imported(pool, folder, corpus, 128, 128, 1)
    assert sorted(expected) == [1, 2]
    for at_import, at_start in paddings:
        found = train_imported(pool, folder, corpus, at_import, at_start, tp)
        assert max(abs(found[step] - expected[step]) for step in expected) < 1e-10, found


def test_padding_that_tensor_parallelism_cannot_split_is_refused_with_the_fix(corpus, tmp_path):
    argv = base_arguments(corpus, make_vocab_size_divisible_by=1, **TENSOR_PARALLEL)
    with pytest.raises(
        ValueError, match="must divide the padded vocabulary = 97. Fix: a --make-vocab"
    ):
        make_plan(load_config(spell(argv)), 2)


def test_the_start_says_how_many_rows_there_are():
    stored, config = (
        load_config(spell(base_arguments("corpus", make_vocab_size_divisible_by=multiple)))
        for multiple in (1, 2)
    )
    (change,) = vocabulary_changes(stored, config)
    assert change.kind == "free"
    assert str(change) == "rows of the embedding, padding included: checkpoint 97, run 98"


def test_a_larger_vocabulary_is_not_padding(pool, corpus, tmp_path):
    save = str(tmp_path / "save")
    first = base_arguments(corpus, save=save, make_vocab_size_divisible_by=1, exit_interval=3)
    assert pool.run(train, 1, first) == ["stopped"]
    other = base_arguments(corpus, save=save, make_vocab_size_divisible_by=1, vocab_size=98)
    assert "the checkpoint's embedding has 97 rows, this run's 98" in refusal(pool, other)
