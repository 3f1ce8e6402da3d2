"""Every architecture, from a folder of transformers through training on two layouts and back.

Random weights by transformers; import; a few steps on tp 2 x pp 2 and on cp 4, in fp64, against
transformers and AdamW; export, compared by --verify and weight by weight.

The cases cover each architecture, and each value of each of these at least once: tied or not, heads
(as many key/value heads as query heads, fewer, one), biases, norms of q and k, rope (plain, linear,
llama3, yarn), windows, and a vocabulary with padding or without.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from model.hf.architecture import Architecture
from model.hf.architectures import ARCHITECTURES
from parallel.layout import World
from pretrain.checkpointing import checkpoint
from pretrain.config.config_yaml import dump_yaml
from pretrain.state import TrainState, checkpoint_tensors, fill_tied_copy
from pretrain.step import train_step
from tests.dist.oracle import train_transformers, widen_parameters
from tests.dist.parity import VOCABULARY, Case, named
from tests.dist.training import write_corpus
from tests.huggingface.model_folders import (
    LINEAR,
    LLAMA3,
    YARN,
    transformers_model,
    write_folder,
)
from tests.marks import cases
from tools.export_hf import Arguments, export
from tools.import_hf import Arguments as ImportArguments
from tools.import_hf import import_folder
from tools.huggingface.stored_model import open_stored_model

STEPS = 3
LEARNING_RATE = 1e-2
TOLERANCE = 1e-10
PLAIN = dict(rope_type="default", rope_theta=5e4)
LAYOUTS = (dict(tp=2, pp=2), dict(cp=4))
PADDED_TO = 2
"""What a run pads the embedding's rows to, whatever the import did."""
NOT_CARRIED = {
    "transformers_version",
    "dtype",
    "_name_or_path",
    "rope_parameters",  # an export writes its defaults, too
    "use_bidirectional_attention",  # null is false
}
"""Keys of a configuration that an export need not have as the source."""
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=8,
    max_position_embeddings=128,
    # transformers keeps the embedding of padding at 0.
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
CASES = {
    "llama tied mqa llama3": dict(
        tie_word_embeddings=True, num_key_value_heads=1, rope_parameters=LLAMA3
    ),
    "mistral untied gqa windows": dict(
        tie_word_embeddings=False, num_key_value_heads=2, sliding_window=7, rope_parameters=PLAIN
    ),
    "qwen2 tied mha biases linear": dict(
        tie_word_embeddings=True, num_key_value_heads=4, rope_parameters=LINEAR
    ),
    "qwen3 untied gqa windows yarn padded": dict(
        tie_word_embeddings=False,
        num_key_value_heads=2,
        rope_parameters=YARN,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "olmo2 untied mha": dict(
        tie_word_embeddings=False, num_key_value_heads=4, rope_parameters=PLAIN
    ),
    "olmo3 untied gqa two ropes windows": dict(
        num_hidden_layers=4,
        tie_word_embeddings=False,
        num_key_value_heads=2,
        sliding_window=6,
        rope_parameters=dict(full_attention=YARN, sliding_attention=PLAIN),
    ),
    "gemma2 tied gqa soft caps windows padded": dict(
        num_key_value_heads=2,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        sliding_window=7,
        rope_parameters=PLAIN,
    ),
    "gemma3_text tied mqa two ropes windows": dict(
        num_hidden_layers=3,
        num_key_value_heads=1,
        sliding_window_pattern=2,
        sliding_window=7,
        query_pre_attn_scalar=8,
        rope_parameters=dict(full_attention=LINEAR, sliding_attention=PLAIN),
    ),
    "granite tied gqa multipliers yarn": dict(
        tie_word_embeddings=True,
        num_key_value_heads=2,
        rope_parameters=YARN,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
    ),
    "smollm3 tied gqa windows without rope padded": dict(
        num_hidden_layers=4,
        tie_word_embeddings=True,
        num_key_value_heads=2,
        no_rope_layers=[1, 0, 1, 0],
        use_sliding_window=True,
        sliding_window=6,
        rope_parameters=PLAIN,
    ),
}
"""First word: model_type; `padded`: the import pads the embedding's rows."""


def test_the_cases_cover_every_architecture():
    assert {name.split()[0] for name in CASES} == set(ARCHITECTURES)


def train_imported(
    world: World, case: Case, source: str, save: str, corpus: str
) -> tuple[list[float], dict]:
    """(losses of the steps, weights after them by name), from an imported checkpoint; publishes
    them in fp32, as of a run on the corpus."""
    layout, stages, optimizer, stepper, loader = case.build(world)
    state = TrainState(stages, optimizer)
    stored = open_stored_model(source, None)
    tensors = checkpoint_tensors(state, with_optimizer=False)
    checkpoint.load(stored.folder, tensors, layout.world, vocab_size=VOCABULARY)
    fill_tied_copy(state)
    losses = []
    for step in range(STEPS):
        batch = loader.read(step * loader.global_batch_tokens)
        losses.append(train_step(stepper, optimizer, batch, LEARNING_RATE, 1.0).loss)
    stored.config.data.data_path = [corpus]
    stored.config.model.make_vocab_size_divisible_by = PADDED_TO
    checkpoint.save(
        save,
        STEPS,
        {name: tensor.float() for name, tensor in tensors.items()},
        dataclasses.replace(stored.progress, step=STEPS),
        dump_yaml(stored.config),
        {},
        layout.world,
        stored.carried,
    )
    return losses, {name: p.full_tensor().detach().numpy() for name, p in named(stages)}


def imported_case(source: str, **layout: int) -> Case:
    """The imported model on a layout."""
    config = open_stored_model(source, None).config.model
    padding = {"make_vocab_size_divisible_by": PADDED_TO}
    return Case(model=dataclasses.asdict(config) | padding, samples=4, **layout)


@pytest.mark.parametrize(
    "name", cases(CASES, lambda name: not name.startswith("gemma3"))
)
def test_a_folder_is_trained_as_by_transformers_and_leaves_as_one(pool, tmp_path, name, capsys):
    kind = name.split()[0]
    folder = write_folder(tmp_path / "hf", kind, **(SHAPE | CASES[name]))
    corpus = write_corpus(tmp_path / "corpus")
    source = str(tmp_path / "imported")
    multiple = 128 if "padded" in name else 1
    import_folder(
        ImportArguments(hf=str(folder), save=source, make_vocab_size_divisible_by=multiple)
    )
    theirs, expected = trained_by_transformers(folder, imported_case(source))
    assert expected[-1] < 0.99 * expected[0], "the curve must go somewhere"
    for number, layout in enumerate(LAYOUTS):
        case = imported_case(source, **layout)
        trained = str(tmp_path / f"trained{number}")
        results = pool.run(train_imported, case.world_size, case, source, trained, corpus)
        for losses, _ in results:
            worst = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
            assert worst < TOLERANCE, f"{layout}: losses {losses}, expected {expected}"
        check_weights(results, ARCHITECTURES[kind], dict(theirs.named_parameters()))

    exported = tmp_path / "exported"
    export(Arguments(load=str(tmp_path / "trained0"), output=str(exported), verify=True))
    assert "DIFFERENT" not in capsys.readouterr().out
    check_export(exported, theirs)


def trained_by_transformers(folder: Path, case: Case):
    """(transformers' model of the folder after the steps, their losses)."""
    theirs = transformers_model(folder)
    widen_parameters(theirs)
    return theirs, train_transformers(theirs, case, STEPS, LEARNING_RATE)


def check_weights(results: list, row: Architecture, theirs: dict) -> None:
    """Assert that every rank's weights are transformers'."""
    seen = set()
    for _, weights in results:
        for name, found in weights.items():
            expected = theirs[row.huggingface_name(name)].detach().numpy()
            error = np.abs(found[: len(expected)] - expected).max()
            assert error < 1e-8, f"{name}: {error:.1e}"
            seen.add(row.huggingface_name(name))
    assert seen == set(theirs), seen ^ set(theirs)


def check_export(folder: Path, theirs) -> None:
    """Assert that transformers makes of an exported folder the model that it trained itself."""
    again = transformers_model(folder)
    assert type(again) is type(theirs)
    before = theirs.config.to_dict()
    after = again.config.to_dict()
    changed = {key for key in before if before[key] != after[key]} - NOT_CARRIED
    assert not changed, {key: (before[key], after[key]) for key in changed}
    # The rope's frequencies.
    found = dict(again.named_buffers())
    for name, expected in theirs.named_buffers():
        assert torch.equal(found[name], expected), name
    found = dict(again.named_parameters())
    assert found.keys() == dict(theirs.named_parameters()).keys()
    for name, expected in theirs.named_parameters():
        error = (found[name] - expected).abs().max()
        assert error < 1e-7 * max(1, expected.abs().max()), f"{name}: {error:.1e}"
