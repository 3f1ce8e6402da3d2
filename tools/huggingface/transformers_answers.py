"""What transformers makes of a folder: logits in fp64 and in fp32, and the text that follows.

The folder is loaded once. fp32 comes first, by both of transformers' ways to compute attention:
how far they differ says how much rounding alone does in this model, and so does fp64. Models with a
soft cap on scores have one way only, eager.

Shapes: T tokens, t of them that are compared, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tools.huggingface.double import KeepDouble, compute_in_double
from tools.huggingface.questions import ComparedSequence, Questions
from tools.shared.message_text import one_line


@dataclass(frozen=True)
class Answers:
    """Holds what transformers computed."""

    double: list[torch.Tensor]
    """fp64 logits [t, V] of each sequence."""
    single: list[torch.Tensor]
    """fp32 logits [t, V] of each sequence."""
    between_ways: float | None
    """How far the fp32 logits of sdpa and eager are apart, at most; None with one way only."""
    rounding: float
    """How far the fp32 logits are from the fp64 ones, at most."""
    continued: torch.Tensor
    """int64 [T]: the prompt and the tokens that follow it."""

    def describe(self) -> str:
        """Say how far transformers' own ways are apart."""
        rounding = f"fp32 - fp64 {self.rounding:.2e}"
        if self.between_ways is None:
            return f"{rounding}; eager only"
        return f"sdpa - eager {self.between_ways:.2e}, {rounding}"


def ask_transformers(folder: Path, questions: Questions) -> Answers:
    """Let transformers answer.

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
            attn_implementation="eager",
            dtype=torch.float32,
            trust_remote_code=False,
            output_attentions=False,
            return_dict=True,
            local_files_only=True,
        ).eval()
        return _answer(model, questions)
    except Exception as error:  # loading runs much code of others, which may raise anything
        raise ValueError(
            f"{folder}: transformers cannot run it ({one_line(error)}). Fix: correct "
            "config.json, or download the folder again."
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def _answer(model: Any, questions: Questions) -> Answers:
    """Compute all answers with a model that computes in fp32, eager; it ends in fp64."""
    sequences = questions.sequences
    single = [_logits(model, sequence) for sequence in sequences]
    between_ways = None
    # sdpa has no soft cap on scores.
    if model._supports_sdpa and not getattr(model.config, "attn_logit_softcapping", None):
        eager = single
        model.set_attn_implementation("sdpa")
        single = [_logits(model, sequence) for sequence in sequences]
        between_ways = largest_difference(single, eager)
        del eager
    continued = _continue(model, questions)

    compute_in_double(model, model.model.layers)
    with KeepDouble():
        double = [_logits(model, sequence) for sequence in sequences]
    return Answers(double, single, between_ways, largest_difference(single, double), continued)


def largest_difference(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> float:
    """Return the largest difference of any two numbers at the same place."""
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))


def _logits(model: nn.Module, sequence: ComparedSequence) -> torch.Tensor:
    """Compute the compared logits [t, V] of one sequence."""
    # With a mask given, a gap between positions is not taken for the beginning of another document.
    with torch.no_grad():
        return model(
            input_ids=sequence.ids[None],
            position_ids=sequence.positions[None],
            attention_mask=torch.ones_like(sequence.ids[None]),
            use_cache=False,
            return_dict=True,
            logits_to_keep=sequence.rows,
        ).logits[0]


def _continue(model: Any, questions: Questions) -> torch.Tensor:
    """Let transformers' generate continue the prompt, always with the largest logit."""
    from transformers import GenerationConfig

    if questions.new_tokens == 0:
        return questions.prompt
    # Without the folder's own settings: no penalty, no id to stop at.
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(
        max_new_tokens=questions.new_tokens, do_sample=False, num_beams=1, pad_token_id=0
    )
    prompt = questions.prompt[None]
    with torch.no_grad():
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
        )[0]
