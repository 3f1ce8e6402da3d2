"""Each fault of an exported folder fails its verification, and in each way that can see it.

The folders are exported as they should be, and changed before they are compared.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.huggingface.model_folders import SHAPE, change_config, change_weights, write_folder
from tools import export_hf, import_hf
from tools.huggingface import verify_export
from tools.huggingface.questions import Questions
from tools.huggingface.stored_model import open_stored_model
from tools.huggingface.transformers_answers import Answers

CONTEXT = SHAPE["max_position_embeddings"]
IDS = torch.randint(SHAPE["vocab_size"], (200,), generator=torch.Generator().manual_seed(5))
KINDS = {
    "llama": {},
    "mistral": {},
    "qwen3": dict(
        use_sliding_window=True, sliding_window=9, max_window_layers=1, num_hidden_layers=3
    ),
    "gemma2": {},
    "gemma3_text": {},
    "granite": {},
}
"""model_type -> what is added to the folders of tests/huggingface/model_folders.py."""
WEIGHTS = "weights: "
SINGLE = "fp32 logits at "
DOUBLE = "fp64 logits at "
TEXT = "tokens that follow a text differ"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """model_type -> (--save folder, folder that was exported from it)."""
    root = tmp_path_factory.mktemp("mutations")
    made = {}
    for kind, changes in KINDS.items():
        source = write_folder(root / f"{kind}-hf", kind, **changes)
        save = root / f"{kind}-run"
        output = root / f"{kind}-exported"
        assert import_hf.main(["--hf", str(source), "--save", str(save), "--no-verify"]) == 0
        export_hf.export(export_hf.Arguments(load=str(save), output=str(output)))
        made[kind] = save, output
    return made


def drop_rope_scaling(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    plain = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    change_config(folder, drop=("rope_scaling",), rope_parameters=plain)


def permute_queries(folder: Path) -> None:
    """Order the numbers of each head as a rope that turns neighbours wants them."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("q_proj.weight")]:
            rows = torch.arange(tensors[name].shape[0]).view(4, 2, -1).transpose(1, 2).reshape(-1)
            tensors[name] = tensors[name][rows].contiguous()

    change_weights(folder, change)


def swap_gate_and_up(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "gate_proj" in name]:
            up = name.replace("gate_proj", "up_proj")
            gate = tensors[name]
            tensors[name] = tensors[up]
            tensors[up] = gate

    change_weights(folder, change)


def export_padded_rows(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, 61))

    change_weights(folder, change)


def export_padded_rows_and_say_so(folder: Path) -> None:
    export_padded_rows(folder)
    change_config(folder, vocab_size=128)


def drop_window(folder: Path) -> None:
    change_config(folder, sliding_window=None)


def shorten_window(folder: Path) -> None:
    change_config(folder, sliding_window=6)


def shift_layer_pattern(folder: Path) -> None:
    types = json.loads((folder / "config.json").read_text())["layer_types"]
    change_config(folder, layer_types=types[1:] + types[:1])


def leave_one_out_of_a_norm(folder: Path) -> None:
    """Store a norm's weight as if it were not added to 1."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"] -= 1

    change_weights(folder, change)


def drop_cap_of_scores(folder: Path) -> None:
    change_config(folder, attn_logit_softcapping=None)


def drop_cap_of_logits(folder: Path) -> None:
    change_config(folder, final_logit_softcapping=None)


def give_windows_the_rope_of_the_others(folder: Path) -> None:
    ropes = json.loads((folder / "config.json").read_text())["rope_parameters"]
    change_config(folder, rope_parameters=ropes | {"sliding_attention": ropes["full_attention"]})


def drop_residual_multiplier(folder: Path) -> None:
    change_config(folder, residual_multiplier=1.0)


def change_one_bit(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].view(torch.int32)[3] ^= 1

    change_weights(folder, change)


def leave_a_tensor_out(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


MUTATIONS: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "rope scaling dropped": ("llama", drop_rope_scaling, (SINGLE, DOUBLE, TEXT)),
    "yarn dropped": ("qwen3", drop_rope_scaling, (SINGLE, DOUBLE, TEXT)),
    "q permuted": ("llama", permute_queries, (WEIGHTS, SINGLE, DOUBLE, TEXT)),
    "gate and up swapped": ("llama", swap_gate_and_up, (WEIGHTS, SINGLE, DOUBLE, TEXT)),
    "padded rows": ("llama", export_padded_rows, (WEIGHTS, "transformers cannot run it")),
    "padded ids": (
        "llama",
        export_padded_rows_and_say_so,
        (WEIGHTS, "transformers' model has 128 token ids, ours 67"),
    ),
    "window dropped": ("mistral", drop_window, (SINGLE, DOUBLE, TEXT)),
    "window shortened": ("mistral", shorten_window, (SINGLE, DOUBLE, TEXT)),
    "layer pattern shifted": ("qwen3", shift_layer_pattern, (SINGLE, DOUBLE, TEXT)),
    "1 + weight of a norm": ("gemma3_text", leave_one_out_of_a_norm, (WEIGHTS, SINGLE, DOUBLE)),
    "soft cap of scores dropped": ("gemma2", drop_cap_of_scores, (SINGLE, DOUBLE, TEXT)),
    # It keeps the order of the logits, and so the greedy text.
    "soft cap of logits dropped": ("gemma2", drop_cap_of_logits, (SINGLE, DOUBLE)),
    "rope of windows": (
        "gemma3_text",
        give_windows_the_rope_of_the_others,
        (SINGLE, DOUBLE, TEXT),
    ),
    "residual multiplier dropped": ("granite", drop_residual_multiplier, (SINGLE, DOUBLE, TEXT)),
    "one bit": ("llama", change_one_bit, (WEIGHTS, "differs in 1 of 16 numbers", DOUBLE)),
    "a tensor left out": (
        "llama",
        leave_a_tensor_out,
        ("layers.1.mlp.up.weight is only in the checkpoint",),
    ),
}
"""Fault -> (model_type, what makes it, parts of the message that fail it)."""


def verify(exported: tuple[Path, Path], folder: Path, monkeypatch) -> None:
    """Verify a folder against the checkpoint that it was exported from."""
    monkeypatch.setattr(verify_export, "_real_text", lambda *_: IDS.numpy())
    stored = open_stored_model(str(exported[0]), None)
    verify_export.verify_export(stored, folder, CONTEXT, None)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_of_the_export_is_seen_by_each_comparison_that_can(
    exported, tmp_path, monkeypatch, name
):
    kind, mutate, parts = MUTATIONS[name]
    folder = shutil.copytree(exported[kind][1], tmp_path / "hf")
    mutate(folder)
    with pytest.raises(ValueError, match="verification of the export failed") as failure:
        verify(exported[kind], folder, monkeypatch)
    missing = [part for part in parts if part not in str(failure.value)]
    assert not missing, (missing, str(failure.value))


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_the_table_says_what_was_compared_and_where_it_differs_most(
    exported, monkeypatch, capsys, kind
):
    verify(exported[kind], exported[kind][1], monkeypatch)
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if "  ok" in line]
    assert "DIFFERENT" not in text
    assert [row for row in rows if "weights, bit for bit" in row and " 0 tensors" in row], text
    assert [row for row in rows if "greedy continuation, 64 tokens" in row], text
    for precision in ("fp32", "fp64"):
        found = [row for row in rows if f"{precision} logits, positions 0 to " in row]
        assert found and "at position " in found[0] and "token id " in found[0], text


def test_two_equal_logits_are_a_tie_and_another_token_is_a_difference(
    tmp_path, monkeypatch, capsys
):
    source = write_folder(tmp_path / "hf", "llama")

    def double_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][33:66] = tensors["lm_head.weight"][:33]

    change_weights(source, double_head)
    save = tmp_path / "run"
    output = tmp_path / "exported"
    assert import_hf.main(["--hf", str(source), "--save", str(save), "--no-verify"]) == 0
    export_hf.export(export_hf.Arguments(load=str(save), output=str(output)))
    ask = verify_export.ask_transformers

    def verify_with_last_token_moved(by: int) -> None:
        def answer(folder: Path, questions: Questions) -> Answers:
            answers = ask(folder, questions)
            answers.continued[-1] = (answers.continued[-1] + by) % 66
            return answers

        monkeypatch.setattr(verify_export, "ask_transformers", answer)
        verify((save, output), output, monkeypatch)

    # Which of the two is taken is rounding's choice, in either library.
    capsys.readouterr()
    verify_with_last_token_moved(0)
    verify_with_last_token_moved(33)
    assert "two logits equal but for rounding" in capsys.readouterr().out
    message = "1 of 64 tokens that follow a text differ, the first at position 95"
    with pytest.raises(ValueError, match=message):
        verify_with_last_token_moved(1)
