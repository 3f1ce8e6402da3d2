"""Is our model the one that transformers makes of a folder? Logits of both, in fp64.

In fp32, rounding alone moves logits by 1e-6 to 2e-5 of the largest one, in transformers as here,
and hides small faults: rms_norm_eps 1e-5 for 1e-6 moved those of a random model by 5e-6 only. In
fp64 the same models differ by 1e-15, and that fault stands out.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from data.batch import IGNORE, Batch
from model.gpt import GPTStage
from tools.shared.message_text import one_line

ALLOWED_SHARE = 1e-8
"""Share of the largest logit by which ours may differ.

Angles are rounded to fp32 in both models, since that rounding belongs to the model: one rounded
otherwise in a few places stays below this.
"""


@dataclass(frozen=True)
class ComparedSequence:
    """Holds tokens at positions, which both models see as one document."""

    name: str
    ids: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int64 [T], rising; with gaps too."""


# ---------------------------------------------------------------- fp64


def compute_in_double(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Make a model compute in fp64 with the weights that it has.

    The weights of a layer are fp64 while it computes, so that memory holds one layer twice; those
    beside the layers stay fp64. Buffers (the rope's frequencies) keep their dtype.
    """
    inside = set()
    for layer in layers:
        parameters = list(layer.parameters())
        inside |= set(parameters)
        _widen_while_computing(layer, parameters)
    for parameter in model.parameters():
        if parameter not in inside:
            parameter.data = parameter.data.double()


def _widen_while_computing(layer: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Hook a layer so that its weights are fp64 during its forward pass only."""
    stored = [parameter.data for parameter in parameters]

    def widen(*_: Any) -> None:
        for parameter, values in zip(parameters, stored):
            parameter.data = values.double()

    def narrow(*_: Any) -> None:
        for parameter, values in zip(parameters, stored):
            parameter.data = values

    layer.register_forward_pre_hook(widen)
    layer.register_forward_hook(narrow, always_call=True)


class _KeepDouble(TorchFunctionMode):
    """Keeps fp64 where code asks for fp32, as transformers' norms do to gain precision."""

    def __torch_function__(self, func, types, args: tuple[Any, ...] = (), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to and args[0].dtype == torch.float64:
            if torch.float32 in (*args[1:], *kwargs.values()):
                return args[0]
        return func(*args, **kwargs)


# ---------------------------------------------------------------- logits


def transformers_logits(folder: Path, sequences: Sequence[ComparedSequence]) -> list[torch.Tensor]:
    """Compute fp64 logits [T, V] of each sequence with transformers; the folder is loaded once.

    Raises:
        ValueError: transformers cannot load or run it; in one line.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # trust_remote_code: the folder's own code is never run, and nobody is asked.
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation="sdpa",
            dtype=torch.float32,
            trust_remote_code=False,
            output_attentions=False,
            return_dict=True,
            local_files_only=True,
        ).eval()
        compute_in_double(model, model.model.layers)
        with _KeepDouble():
            return [_transformers_logits(model, sequence) for sequence in sequences]
    except Exception as error:  # loading runs much code of others, which may raise anything
        raise ValueError(
            f"{folder}: transformers cannot run it ({one_line(error)}). Fix: correct "
            "config.json, or download the folder again."
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def _transformers_logits(model: nn.Module, sequence: ComparedSequence) -> torch.Tensor:
    """Compute the logits [T, V] of one sequence with a model of transformers."""
    # With a mask given, a gap between positions is not taken for the beginning of another document.
    with torch.no_grad():
        return model(
            input_ids=sequence.ids[None],
            position_ids=sequence.positions[None],
            attention_mask=torch.ones_like(sequence.ids[None]),
            use_cache=False,
            return_dict=True,
        ).logits[0]


def our_logits(model: GPTStage, vocab_size: int, sequence: ComparedSequence) -> torch.Tensor:
    """Compute the logits [T, V] of one sequence with our whole model, without padded ids."""
    ids = sequence.ids
    batch = Batch(
        tokens=ids,
        labels=torch.full_like(ids, IGNORE),
        positions=sequence.positions,
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
    )
    with torch.no_grad():
        return model.logits(model.hidden(ids, batch))[:, :vocab_size]


# ---------------------------------------------------------------- comparison


def find_differences(
    model: GPTStage,
    vocab_size: int,
    sequences: Sequence[ComparedSequence],
    expected: Sequence[torch.Tensor],
) -> list[str]:
    """Compare our model with transformers' logits, and print each comparison -> what is wrong."""
    problems = []
    for sequence, theirs in zip(sequences, expected, strict=True):
        problem = _judge(sequence, our_logits(model, vocab_size, sequence), theirs)
        if problem:
            problems.append(problem)
    return problems


def _judge(sequence: ComparedSequence, ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """Print the comparison of one sequence -> what is wrong, or None."""
    largest = float(theirs.abs().max())
    difference = float((ours - theirs).abs().max())
    allowed = ALLOWED_SHARE * largest
    is_same = difference <= allowed
    print(
        f"verify: {sequence.name}: ours - transformers {difference:.2e}, allowed {allowed:.2e}, "
        f"largest logit {largest:.2f}: {'ok' if is_same else 'DIFFERENT'}",
        flush=True,
    )
    if is_same:
        return None
    return f"logits at {sequence.name} differ by {difference:.2e}, allowed {allowed:.2e}"
