"""Generation against transformers' generate: new tokens per second of the same model on this CPU.

Random weights of Llama's shape in one folder, which both open; the same dtype, threads, prompts and
greedy search, in turns whose order changes from round to round. The tokens of both are compared.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data.stream import usable_cores
from parallel.layout import single_process_layout
from tools.bench.option_checks import find_too_small
from tools.bench.report import bar_at_least, describe_machine, markdown_table, publish
from tools.inference.decoding import Continuation, continue_batch
from tools.inference.open_model import OpenModel, open_model
from tools.inference.sampling import Sampling

CPU = torch.device("cpu")
SPEED_BAR = 1.0
"""Tokens per second over transformers' that are asked for, in each case."""
Contender = Callable[[list[list[int]]], list[list[int]]]
"""Continues prompts -> the new tokens of each."""


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    layers: int = 12
    hidden_size: int = 768
    ffn_hidden_size: int = 2048
    heads: int = 12
    kv_heads: int = 4
    vocab_size: int = 32000
    batch_sizes: tuple[int, ...] = (1, 8)
    """Prompts that are continued at once."""
    prompt_tokens: int = 128
    new_tokens: int = 64
    ragged: bool = False
    """Give the prompts of a batch different lengths; transformers pads them on the left."""
    repeats: int = 5
    """Rounds that are timed, after one that is not."""
    threads: int | None = None
    """Threads of both; by default one per core."""
    output: str | None = None
    """Also append the report to this file."""


def run(arguments: Arguments) -> int:
    """Time both, print the table; 0 if the bar holds in every case, 2 where it cannot run."""
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads or usable_cores())
    machine = describe_machine(("transformers",))
    with tempfile.TemporaryDirectory() as folder:
        theirs = write_model(arguments, Path(folder))
        ours = open_model(folder, single_process_layout(CPU), precision="fp32")
    contenders: dict[str, Contender] = {
        "ours": lambda prompts: continue_with_ours(ours, prompts, arguments),
        "transformers": lambda prompts: continue_with_theirs(theirs, prompts, arguments),
    }
    rows = []
    bars = []
    is_reached = True
    for size in arguments.batch_sizes:
        prompts = draw_prompts(arguments, size)
        speeds, same = time_in_turns(contenders, prompts, arguments)
        ratio = speeds["ours"] / speeds["transformers"]
        is_reached = is_reached and ratio >= SPEED_BAR
        rows.append(
            [str(size), *(f"{speeds[name]:.1f}" for name in contenders), f"{ratio:.2f}", same]
        )
        bars.append(
            bar_at_least(f"tokens/s with batch {size} over transformers'", ratio, SPEED_BAR)
        )
    header = ["batch", *(f"{name}, tokens/s" for name in contenders), "ratio", "same tokens"]
    text = [machine, "", describe(arguments), "", markdown_table(header, rows), "", *bars]
    publish("\n".join(text), arguments.output)
    return 0 if is_reached else 1


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    too_small = find_too_small(
        arguments,
        layers=1,
        hidden_size=1,
        ffn_hidden_size=1,
        heads=1,
        kv_heads=1,
        vocab_size=1,
        batch_sizes=1,
        prompt_tokens=1,
        new_tokens=1,
        repeats=1,
        threads=1,
    )
    if too_small:
        return too_small
    # A rope turns pairs of a head's channels.
    if arguments.hidden_size % (2 * arguments.heads):
        return (
            f"--hidden-size {arguments.hidden_size}: must be a multiple of two for each of --heads "
            f"{arguments.heads}. Fix: for example {64 * arguments.heads}."
        )
    if arguments.heads % arguments.kv_heads:
        return (
            f"--kv-heads {arguments.kv_heads}: must divide --heads {arguments.heads}. "
            "Fix: for example 1."
        )
    return None


def describe(arguments: Arguments) -> str:
    """Say in one line what both do."""
    lengths = f"{arguments.prompt_tokens} tokens"
    if arguments.ragged:
        lengths = f"from {arguments.prompt_tokens // 2} to {lengths}"
    return (
        f"{arguments.layers} layers of hidden size {arguments.hidden_size}, fp32, "
        f"{torch.get_num_threads()} threads, prompts of {lengths}, {arguments.new_tokens} new "
        "tokens each; the prompt's pass counts"
    )


def write_model(arguments: Arguments, folder: Path) -> Any:
    """Write a folder of random weights -> transformers' model of it."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.ffn_hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=arguments.prompt_tokens + arguments.new_tokens,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def draw_prompts(arguments: Arguments, size: int) -> list[list[int]]:
    """Draw the prompts of a batch."""
    generator = torch.Generator().manual_seed(size)
    longest = arguments.prompt_tokens
    lengths = [longest] * size
    if arguments.ragged:
        step = longest // 2 / max(1, size - 1)
        lengths = [longest - round(step * number) for number in range(size)]
    return [
        torch.randint(arguments.vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]


def continue_with_ours(
    model: OpenModel, prompts: list[list[int]], arguments: Arguments
) -> list[list[int]]:
    """Continue with our model."""
    batch = [Continuation(i, ids, arguments.new_tokens) for i, ids in enumerate(prompts)]
    continue_batch(model, batch, Sampling())
    return [each.added for each in batch]


def continue_with_theirs(
    model: Any, prompts: list[list[int]], arguments: Arguments
) -> list[list[int]]:
    """Continue with transformers, as its users do: padded on the left, with a cache."""
    longest = max(len(ids) for ids in prompts)
    ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=arguments.new_tokens,
        pad_token_id=0,
    )
    return out[:, longest:].tolist()


def time_in_turns(
    contenders: dict[str, Contender], prompts: list[list[int]], arguments: Arguments
) -> tuple[dict[str, float], str]:
    """Let both continue the prompts in turns -> (tokens per second by name, are they the same)."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, list[list[int]]] = {}
    for turn in range(1 + arguments.repeats):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            found[name] = contenders[name](prompts)
            # The first round warms up.
            if turn:
                times[name].append(time.perf_counter() - start)
    tokens = len(prompts) * arguments.new_tokens
    one, other = found.values()
    same = sum(a == b for a, b in zip(one, other, strict=True))
    print(f"batch {len(prompts)}: done", file=sys.stderr)
    return {name: tokens / median(each) for name, each in times.items()}, f"{same}/{len(prompts)}"
