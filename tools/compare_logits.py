"""Is our model the one that transformers makes of a folder? Logits of both, in fp32.

The yardstick is transformers itself: its sdpa and eager attention paths compute the same model and
differ by rounding only. They share the rounding of all else, which is a share of the largest logit:
up to 2e-5 of it separate fp32 from fp64 in random models of 6 layers, in transformers as here.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.batch import IGNORE, Batch
from model.gpt import GPTStage
from tools.hf_keys import one_line

ALLOWED = 8.0
"""Largest |ours - sdpa| in units of the largest |sdpa - eager|."""
ALLOWED_SHARE = 5e-5
"""Share of the largest logit that counts as rounding; bf16 rounds 80 times as coarsely."""


@dataclass(frozen=True)
class Sequence:
    """Tokens at positions, seen as one document."""

    name: str
    ids: torch.Tensor
    positions: torch.Tensor
    """Rising; with gaps too."""


@dataclass(frozen=True)
class Reference:
    """transformers' logits of a sequence."""

    logits_tV: torch.Tensor
    yardstick: float
    """Largest difference between its sdpa and its eager path."""


def transformers_references(folder: Path, sequences: list[Sequence]) -> list[Reference]:
    """What transformers computes from a folder, which is loaded once.

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
        sdpa = [_transformers_logits(model, sequence) for sequence in sequences]
        model.set_attn_implementation("eager")
        yardsticks = [
            float((_transformers_logits(model, sequence) - logits).abs().max())
            for sequence, logits in zip(sequences, sdpa)
        ]
    except Exception as error:  # loading runs much code of others, which may raise anything
        raise ValueError(
            f"{folder}: transformers cannot run it ({one_line(error)}). Fix: correct "
            "config.json, or download the folder again."
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    return [Reference(logits, yardstick) for logits, yardstick in zip(sdpa, yardsticks)]


def _transformers_logits(model, sequence: Sequence) -> torch.Tensor:
    # With a mask given, a gap between positions is not taken for the beginning of another document.
    with torch.no_grad():
        return model(
            input_ids=sequence.ids[None],
            position_ids=sequence.positions[None],
            attention_mask=torch.ones_like(sequence.ids[None]),
            use_cache=False,
            return_dict=True,
        ).logits[0]


def our_logits(model: GPTStage, vocab_size: int, sequence: Sequence) -> torch.Tensor:
    """Logits of our whole model [t, V], without the padded vocabulary."""
    ids = sequence.ids
    batch = Batch(
        tokens=ids,
        labels=torch.full_like(ids, IGNORE),
        positions=sequence.positions,
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
    )
    with torch.no_grad():
        return model.logits(model.hidden(ids, batch))[:, :vocab_size]


def judge(sequence: Sequence, ours: torch.Tensor, reference: Reference) -> str | None:
    """Print the comparison of one sequence -> what is wrong, or None."""
    largest = float(reference.logits_tV.abs().max())
    difference = float((ours - reference.logits_tV).abs().max())
    allowed = max(ALLOWED * reference.yardstick, ALLOWED_SHARE * largest)
    is_same = difference <= allowed
    print(
        f"verify: {sequence.name}: ours - transformers {difference:.2e}, transformers sdpa - eager "
        f"{reference.yardstick:.2e}, allowed {allowed:.2e}, largest logit {largest:.2f}: "
        f"{'ok' if is_same else 'DIFFERENT'}",
        flush=True,
    )
    if is_same:
        return None
    return f"logits at {sequence.name} differ by {difference:.2e}, allowed {allowed:.2e}"
