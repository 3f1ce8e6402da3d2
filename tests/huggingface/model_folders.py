"""Tiny Hugging Face folders for tests, written by transformers itself."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SHAPE = dict(
    vocab_size=67,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=24,
)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=3.0, original_max_position_embeddings=32)
MODELS = {
    "llama": dict(head_dim=4, rope_parameters=LLAMA3),
    "mistral": dict(sliding_window=7),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=8, rope_parameters=YARN),
    "olmo2": dict(eos_token_id=None, rope_parameters=LINEAR),
    "olmo3": dict(
        num_hidden_layers=4,
        eos_token_id=None,
        sliding_window=7,
        rope_parameters=dict(
            full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=1e4)
        ),
    ),
    "gemma2": dict(
        head_dim=6,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        sliding_window=7,
    ),
    "gemma3_text": dict(
        num_hidden_layers=3, sliding_window_pattern=2, head_dim=8, sliding_window=7
    ),
    "granite": dict(
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
    ),
    "smollm3": dict(
        num_hidden_layers=4,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        no_rope_layers=[1, 0, 0, 1],
        use_sliding_window=True,
        sliding_window=7,
        layer_types=[
            "full_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
        rope_parameters=LINEAR,
    ),
}
"""model_type -> settings beside SHAPE: all ropes, tied and untied, head sizes of their own,
windows."""


def write_folder(folder: Path, kind: str, **changes) -> Path:
    """Write a folder of this architecture with random weights."""
    return Path(shutil.copytree(_saved(kind, json.dumps(changes, sort_keys=True)), folder))


@cache
def _saved(kind: str, settings: str) -> str:
    """Save a model as transformers saves it, once; large weights, so that logits differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    changes = json.loads(settings)
    config = AutoConfig.for_model(kind, **(SHAPE | MODELS[kind] | changes))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.3 * noise)
    folder = tempfile.mkdtemp(prefix="ithaca-hf-")
    atexit.register(shutil.rmtree, folder)
    model.save_pretrained(folder)
    return folder


def change_config(folder: Path, *, drop: tuple[str, ...] = (), **changes) -> None:
    """Rewrite config.json with other values and without some keys."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: content[key] for key in content if key not in drop}))


def change_weights(folder: Path, change) -> None:
    """Rewrite model.safetensors after `change` has edited its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def transformers_model(folder: Path):
    """What transformers makes of a folder, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, return_dict=True
    ).eval()


def transformers_logits(model, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [t, V] of tokens that are one document, whatever their positions are."""
    with torch.no_grad():
        return model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=torch.ones_like(ids[None]),
            use_cache=False,
            return_dict=True,
        ).logits[0]
