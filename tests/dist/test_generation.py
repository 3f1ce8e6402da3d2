"""What a model continues prompts with is what transformers makes of them, on any tp x cp."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.attention_backends.choice import choose_attention
from model.build import build_whole_model, parameter_shapes
from model.config import ModelConfig
from model.activation_memory.settings import MemorySettings
from parallel.config import LayoutConfig
from parallel.layout import Layout, World, build_layout, single_process_layout
from tests.huggingface.model_folders import SHAPE, transformers_model, write_folder
from tools.huggingface.compare_logits import our_logits
from tools.huggingface.questions import ComparedSequence
from tools.inference.decoding import (
    Continuation,
    _read_prompts,
    all_logits,
    continue_batch,
    make_cache,
)
from tools.inference.generation_settings import GenerationSettings
from tools.inference.open_model import OpenModel, open_model
from tools.inference.sampling import Sampling

CPU = torch.device("cpu")
TOLERANCE = 1e-10
NEW_TOKENS = 20
LENGTHS = (1, 30, 5)
"""Shorter and longer than the window of 7, and the end of none of them the same."""
WINDOWS = {
    "llama": {},
    "mistral": {},
    "gemma3_text": {},
    "olmo3": {},
    "smollm3": {},
    "qwen3": dict(
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
}
"""Architectures, some of them with windows in some layers and with a rope of their own there
or layers without one."""


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(11)
    return [generator.integers(0, SHAPE["vocab_size"], size=length).tolist() for length in LENGTHS]


def greedy_of_transformers(folder, ids: list[int], count: int) -> list[int]:
    model = transformers_model(folder)
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def continuations(count: int = NEW_TOKENS) -> list[Continuation]:
    return [Continuation(number, ids, count) for number, ids in enumerate(prompts())]


def continued(load: str, layout: Layout, sampling: Sampling, precision="fp64") -> list[list[int]]:
    batch = continuations()
    continue_batch(open_model(load, layout, precision=precision), batch, sampling)
    return [each.added for each in batch]


def continued_on_ranks(world: World, load: str, sizes: dict, samplings: list[Sampling]) -> list:
    layout = build_layout(LayoutConfig(**sizes), world)
    return [continued(load, layout, sampling) for sampling in samplings]


@pytest.mark.parametrize("kind", WINDOWS)
def test_greedy_tokens_are_those_of_transformers(tmp_path, kind):
    folder = write_folder(tmp_path / "hf", kind, **WINDOWS[kind])
    found = continued(str(folder), single_process_layout(CPU), Sampling(), "fp32")
    for ids, tokens in zip(prompts(), found, strict=True):
        assert tokens == greedy_of_transformers(folder, ids, NEW_TOKENS)


@pytest.mark.parametrize("kind", WINDOWS)
def test_logits_of_every_step_are_those_without_a_cache(tmp_path, kind):
    folder = write_folder(tmp_path / "hf", kind, **WINDOWS[kind])
    assert_cached_logits_are_right(open_model(str(folder), single_process_layout(CPU), precision="fp64"))


PARTS = {
    "sinks": dict(softmax_type="learnable", window_size=[6, 0], window_attn_skip_freq=[2]),
    "caps": dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0, softmax_scale=0.3),
    "all": dict(
        softmax_type="learnable",
        attn_logit_softcapping=5.0,
        window_size=[6, 0],
        window_attn_skip_freq=[2],
        window_rotary_base=500.0,
        no_rope_freq=[3],
        norm_placement="both",
        apply_layernorm_1p=True,
        qk_layernorm=True,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
    ),
}
"""Parts of layers beside those of Llama, which a cache must not lose."""


@pytest.mark.parametrize("parts", PARTS)
def test_logits_of_every_step_are_right_with_other_parts(parts):
    config = ModelConfig(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        **PARTS[parts],
    )
    vocabulary = SHAPE["vocab_size"]
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4
        for name, shape in parameter_shapes(config, vocabulary).items()
    }
    attend, _ = choose_attention("sdpa", CPU, torch.float64)
    stage = build_whole_model(config, vocabulary, tensors, attend, CPU)
    model = OpenModel(
        stage=stage,
        config=config,
        vocab_size=vocabulary,
        context_length=96,
        tokenizer=None,
        first_ids=(),
        generation=GenerationSettings(),
        dtype=torch.float64,
        source=Path(),
        notes=(),
    )
    assert_cached_logits_are_right(model)


@torch.no_grad()
def assert_cached_logits_are_right(model: OpenModel) -> None:
    """Compare the logits of each step with those of all its tokens at once."""
    batch = continuations()
    cache = make_cache(model, batch)
    x_bD = _read_prompts(model, batch, cache)
    compared = 0
    for _ in range(NEW_TOKENS):
        found = all_logits(model, x_bD)
        for each, logits in zip(batch, found, strict=True):
            ids = torch.tensor(each.prompt + each.added)
            sequence = ComparedSequence("", ids, torch.arange(len(ids)))
            expected = our_logits(model.stage, model.vocab_size, sequence)[-1]
            assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()
            compared += 1
            each.added.append(int(logits.argmax()))
        x_bD = model.stage.hidden_of_next(found.argmax(dim=1), cache)
    assert compared == NEW_TOKENS * len(LENGTHS)


def test_head_chunks_leave_no_part_of_the_cache_empty(tmp_path):
    folder = write_folder(tmp_path / "hf", "llama")
    expected = continued(str(folder), single_process_layout(CPU), Sampling())
    model = open_model(str(folder), single_process_layout(CPU), precision="fp64")
    model.stage.memory = MemorySettings(attention_head_chunks=2)
    batch = continuations()
    continue_batch(model, batch, Sampling())
    assert [each.added for each in batch] == expected


def test_a_layer_with_a_window_keeps_no_more_than_the_window(tmp_path):
    folder = write_folder(tmp_path / "hf", "qwen3", **WINDOWS["qwen3"])
    model = open_model(str(folder), single_process_layout(CPU))
    capacities = [layer.capacity for layer in make_cache(model, continuations()).layers.values()]
    # 30 tokens of the longest prompt, and 20 more of which the last is never attended to.
    assert capacities == [49, 7, 7]


LAYOUTS = [
    dict(tensor_model_parallel_size=2),
    dict(context_parallel_size=2),
    dict(context_parallel_size=3),
    dict(tensor_model_parallel_size=2, context_parallel_size=2),
    dict(
        context_parallel_size=4,
        cp_comm_type="a2a+allgather",
        hierarchical_context_parallel_sizes=[2, 2],
    ),
]
"""Heads split evenly and not, one level and two."""


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_every_layout_gives_the_tokens_of_one_process(pool, tmp_path, sizes):
    folder = str(write_folder(tmp_path / "hf", "qwen3", **WINDOWS["qwen3"]))
    samplings = [Sampling(), Sampling(temperature=1.0, top_k=30, top_p=0.95, seed=3)]
    expected = [continued(folder, single_process_layout(CPU), each) for each in samplings]
    assert expected[0] != expected[1]
    count = sizes.get("tensor_model_parallel_size", 1) * sizes.get("context_parallel_size", 1)
    for found in pool.run(continued_on_ranks, count, folder, sizes, samplings):
        assert found == expected


LONG_PROMPT = 32768
"""Tokens of the prompt that four processes share."""


def continued_long(load: str, layout: Layout) -> list[int]:
    generator = np.random.default_rng(1)
    ids = generator.integers(0, SHAPE["vocab_size"], size=LONG_PROMPT).tolist()
    batch = [Continuation(0, ids, 16)]
    continue_batch(open_model(load, layout, precision="fp32"), batch, Sampling())
    return batch[0].added


def continued_long_on_ranks(world: World, load: str, sizes: dict) -> list[int]:
    return continued_long(load, build_layout(LayoutConfig(**sizes), world))


@pytest.mark.long
def test_a_long_prompt_on_cp_gives_the_tokens_of_one_process(pool, tmp_path):
    folder = str(
        write_folder(
            tmp_path / "hf", "llama", max_position_embeddings=LONG_PROMPT + 16, rope_parameters=None
        )
    )
    expected = continued_long(folder, single_process_layout(CPU))
    assert len(set(expected)) > 1
    for found in pool.run(continued_long_on_ranks, 4, folder, dict(context_parallel_size=4)):
        assert found == expected
