"""The length from which on `mixed` gives a document to cuDNN: measured, agreed on, kept beside the
run."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from model.activation_memory.settings import MemorySettings
from model.attention_backends import crossover
from model.attention_backends.kernel_calls import NEVER, assumed_crossover, padded_length
from model.config import ModelConfig
from model.presets import PRESETS
from parallel.config import LayoutConfig
from parallel.layout import Axis, single_process_layout
from pretrain import attention_backend as attention
from pretrain.checkpointing.setting_changes import kind_of
from pretrain.config.config import CheckpointConfig, Config
from pretrain.config.facts import facts_of_section, problems_of

CPU = torch.device("cpu")
HEADS = (4, 2, 8)
ASSUMED = 23552
"""What is assumed for them: sqrt(0.4 ms / (24 fs x 4 x 8)) = 22,822 tokens, padded by 1,024."""
PADDED = [512, 1024, 2048, 4096, 8192, 16384, 32768]
"""The lengths measured with 4 query heads: 32 / 4 heads less need sqrt(8) times the length, rounded
up to 4."""


@pytest.mark.parametrize(
    "milliseconds, expected",
    [
        ({500: (2, 1), 1000: (1, 2), 2000: (1, 2)}, 1000),
        ({500: (1, 2), 1000: (2, 1), 2000: (1, 2)}, 2000),
        ({500: (1, 2), 1000: (1, 2), 2000: (1, 1)}, 4000),  # behind as far as was measured
        ({500: (1, 2), 1000: (1, 2), 2000: (1, 2)}, 500),
    ],
)
def test_the_crossover_is_the_length_from_which_on_cudnn_stays_ahead(milliseconds, expected):
    assert crossover.crossover_of(milliseconds) == expected


@pytest.mark.parametrize(
    "heads, expected",
    [((32, 8, 128), 2048), ((64, 8, 128), 1536), ((32, 8, 64), 3072), ((4, 1, 128), 5888)],
)
def test_the_fewer_and_smaller_the_heads_the_longer_the_assumed_crossover(heads, expected):
    assert assumed_crossover(heads) == expected


def test_both_kernels_are_timed_on_the_same_documents():
    timed = []

    def time_call(attend, q, k, v, segments) -> float:
        longest = segments.max_q
        (own,) = {key for key in (1, NEVER) if attend.__closure__[0].cell_contents == key}
        timed.append((longest, own == 1))
        total = segments.bounds_q[-1]
        assert (q.shape, k.shape) == ((total, 4, 8), (total, 2, 8))
        assert total % longest == 0 and 32768 - longest < total <= 32768  # whole documents
        return 1.0 if (own == 1) == (longest >= 1500) else 2.0

    found = crossover.measure((4, 2, 8), CPU, torch.float32, time_call)
    lengths = [crossover.document_length(padded) for padded in PADDED]
    assert timed == [(length, by_cudnn) for length in lengths for by_cudnn in (True, False)]
    assert [padded_length(length) for length in lengths] == PADDED
    assert crossover.crossover_of(found) == lengths[2]


def config_of(save=None, crossover_tokens=None) -> Config:
    return Config(
        model=ModelConfig(**PRESETS["tiny"], attention_crossover_tokens=crossover_tokens),
        checkpoint=CheckpointConfig(save=None if save is None else str(save)),
    )


@pytest.fixture
def card(monkeypatch):
    """A card whose measurement says 960 tokens; `measured` counts how often it was asked."""
    found = SimpleNamespace(name="card A", measured=0)

    def measure(heads, device, dtype):
        found.measured += 1
        return {480: (2.0, 1.0), 960: (1.0, 2.0)}

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found.name)
    monkeypatch.setattr(attention, "measure", measure)
    return found


def find(config: Config, heads=HEADS, is_needed: bool = True) -> tuple[int, str]:
    return attention.find_crossover(config, heads, CPU, torch.bfloat16, is_needed=is_needed)


def test_what_was_measured_is_kept_and_read_at_a_restart(card, tmp_path):
    tokens, how = find(config_of(tmp_path))
    assert tokens == 960
    assert how == (
        "; to cuDNN go documents of at least 960 tokens (measured, ms by cuDNN/varlen for "
        "documents of: 480 2.00/1.00, 960 1.00/2.00)"
    )
    (entry,) = json.loads((tmp_path / attention.FILE).read_text())
    assert (
        entry["card"],
        entry["torch"],
        entry["heads"],
        entry["lengths"],
        entry["crossover"],
    ) == ("card A", torch.__version__, [4, 2, 8], PADDED, 960)
    assert find(config_of(tmp_path))[0] == 960
    assert card.measured == 1, "a run that is started again measures nothing"


def test_another_card_and_other_heads_are_measured_for_themselves(card, tmp_path):
    find(config_of(tmp_path))
    card.name = "card B"
    find(config_of(tmp_path))
    find(config_of(tmp_path), heads=(8, 2, 8))
    assert card.measured == 3
    assert len(json.loads((tmp_path / attention.FILE).read_text())) == 3


@pytest.mark.parametrize(
    "heads, longest",
    [
        ((64, 8, 128), 8192),
        ((32, 8, 128), 8192),
        ((16, 8, 128), 16384),
        ((8, 2, 128), 16384),
        ((4, 2, 8), 32768),
        ((1, 1, 128), 65536),
    ],
)
def test_few_heads_are_measured_on_longer_documents(heads, longest):
    found = crossover.padded_lengths(heads)
    assert found[0] == 512 and found[-1] == longest
    assert found == [512 << number for number in range(len(found))]


def test_a_kernel_that_fails_while_it_is_measured_does_not_end_the_run(card, tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no plan for this shape\nand more")

    monkeypatch.setattr(attention, "measure", refuse)
    tokens, how = find(config_of(tmp_path))
    assert tokens == ASSUMED and "(assumed: measuring failed with no plan for this shape)" in how
    assert not (tmp_path / attention.FILE).exists()


def test_a_folder_that_cannot_be_written_does_not_end_the_run(card, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(attention, "write_atomically", refuse)
    assert find(config_of(tmp_path))[0] == 960
    assert (
        "cannot be written (No space left on device); a restart measures again"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "7",
        "{}",
        '""',
        '[{"card": "card A"}]',
        '[{"crossover": -1}]',
        '[{"crossover": true}]',
    ],
)
def test_a_file_that_is_not_ours_is_measured_again_and_said(card, tmp_path, capsys, text):
    (tmp_path / attention.FILE).write_text(text)
    assert find(config_of(tmp_path))[0] == 960
    assert "is not a list of measured crossovers, and is replaced" in capsys.readouterr().err
    assert len(json.loads((tmp_path / attention.FILE).read_text())) == 1


def test_nothing_is_measured_where_nothing_could_be_kept_or_it_was_asked_for(card, tmp_path):
    assert find(config_of()) == (
        ASSUMED,
        "; to cuDNN go documents of at least 23,552 tokens (assumed: without --save nothing is "
        "measured)",
    )
    assert find(config_of(tmp_path, 700)) == (
        700,
        "; to cuDNN go documents of at least 700 tokens (asked for)",
    )
    assert find(config_of(tmp_path), is_needed=False) == (ASSUMED, "")
    assert card.measured == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank, own", [(0, 960), (1, 0), (3, 0)])
def test_all_ranks_have_the_number_of_the_first(monkeypatch, rank, own):
    """All ranks add up, and only the first has something to add."""
    world = Axis("world", rank, 4, (0, 1, 2, 3), None)
    monkeypatch.setattr(attention, "all_reduce", lambda x, axis: x + (960 if axis.rank else 0))
    assert (
        attention.tell_all(own, dataclasses.replace(single_process_layout(CPU), world=world)) == 960
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_the_run_attends_with_what_the_first_rank_found(monkeypatch, card, tmp_path, rank):
    """Also on a rank that does not have the backend: all take part in telling."""
    made = []
    told = []
    backend = SimpleNamespace(name="mixed", make=lambda tokens: made.append(tokens) or "attend")
    world = Axis("world", rank, 2, (0, 1), None)
    layout = dataclasses.replace(single_process_layout(torch.device("cuda")), world=world)
    phase = SimpleNamespace(layout=LayoutConfig(), memory=MemorySettings(), attention_on_tape=True)
    monkeypatch.setattr(attention, "pick_backend", lambda *args, **options: (backend, "why"))
    monkeypatch.setattr(attention, "tell_all", lambda tokens, layout: told.append(tokens) or 960)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    attend, line = attention.attention_of_run(
        config_of(tmp_path), [phase], phase, layout, torch.bfloat16
    )
    assert (attend, made, told) == ("attend", [960], [960 if rank == 0 else 0])
    assert line.startswith("attention: mixed (why)")
    assert card.measured == (rank == 0), "one rank measures"


@pytest.mark.parametrize("asked, said", [(700, True), (None, False)])
def test_a_crossover_for_another_backend_is_said_to_have_no_effect(asked, said):
    phase = SimpleNamespace(layout=LayoutConfig(), memory=MemorySettings(), attention_on_tape=False)
    _, line = attention.attention_of_run(
        config_of(None, asked), [phase], phase, single_process_layout(CPU), torch.float32
    )
    assert line.startswith("attention: sdpa (")
    assert ("attention_crossover_tokens = 700 has no effect" in line) == said


@pytest.mark.parametrize(
    "layout, chunks, expected",
    [
        (LayoutConfig(), 1, (32, 8, 128)),
        (LayoutConfig(tensor_model_parallel_size=2), 1, (16, 4, 128)),
        (LayoutConfig(context_parallel_size=8), 1, (4, 1, 128)),
        (LayoutConfig(context_parallel_size=8), 4, (1, 1, 128)),
        (
            LayoutConfig(context_parallel_size=12),
            1,
            (3, 3, 128),
        ),  # uneven: key/value heads are copied per query head
    ],
)
def test_the_heads_that_are_measured_are_those_of_a_call(layout, chunks, expected):
    config = Config(model=ModelConfig(**PRESETS["qwen3-8b"]))
    phase = SimpleNamespace(layout=layout, memory=MemorySettings(attention_head_chunks=chunks))
    assert attention.heads_of_call(config, phase) == expected


def test_the_setting_is_checked():
    def problems(**settings) -> list[str]:
        return problems_of(ModelConfig(**PRESETS["tiny"], **settings))

    assert problems(attention_crossover_tokens=0) == [
        "attention_crossover_tokens = 0: must be at least 1. Fix: the tokens of a document, or "
        "leave it out to have it measured."
    ]
    assert problems(attention_crossover_tokens=512, attention_backend="varlen") == [
        "attention_crossover_tokens = 512: is for the backend mixed, but attention_backend = "
        "varlen. Fix: remove one of them."
    ]
    assert problems(attention_crossover_tokens=512) == []
    assert problems(attention_crossover_tokens=1, attention_backend="mixed") == []


def test_the_setting_is_as_free_at_a_restart_as_the_backend():
    assert (
        kind_of("model", "attention_crossover_tokens")
        == kind_of("model", "attention_backend")
        == "free"
    )
    facts = facts_of_section(ModelConfig)
    assert not facts["attention_crossover_tokens"].of_weights
    assert not facts["attention_backend"].of_weights
