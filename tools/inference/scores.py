"""How likely a model finds given texts: the log-probability of every token, on any tp x cp.

Legend: T tokens of the packed texts, t those of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.loss import LossSettings, score_each
from parallel.collectives import all_reduce
from tools.inference.open_model import OpenModel
from tools.inference.packed import pack_texts, rows_of_rank


@dataclass(frozen=True)
class TextScores:
    """Scores the tokens of one text after its first, on the CPU: [tokens - 1] each."""

    log_probabilities: torch.Tensor
    """Natural logarithm of the probability of each token, given those before it; at least fp32."""
    are_likeliest: torch.Tensor
    """Would greedy generation have taken this token? bool"""


@torch.no_grad()
def score_texts(model: OpenModel, texts: Sequence[Sequence[int]]) -> list[TextScores]:
    """Score every token of some texts in one forward pass; every process gets all scores.

    The texts are packed, and no one sees another. Choose how many fit into memory together: logits
    exist for a chunk of tokens at a time, activations for all T / cp tokens of a process.

    Args:
        texts: token ids, at least one each.
    """
    stage = model.stage
    layout = model.layout
    batch = pack_texts(texts, layout)
    x_tD, weight_vD = stage.head_inputs(stage.hidden(batch.tokens, batch))
    settings = LossSettings(layout.tp, model.vocab_size, stage.memory.loss_tokens, stage.softcap)
    losses_t, hits_t = score_each(x_tD, weight_vD, batch.labels, settings)
    # Each rank puts its tokens' scores in their places; the others' are 0 there.
    total = int(batch.cu_seqlens[-1])
    rows_t = rows_of_rank(total, layout)
    both_T2 = torch.zeros(total, 2, dtype=losses_t.dtype, device=layout.device)
    both_T2[rows_t.to(layout.device)] = torch.stack([-losses_t, hits_t.to(losses_t.dtype)], dim=1)
    both_T2 = all_reduce(both_T2, layout.cp).cpu()

    found = []
    begin = 0
    for text in texts:
        part = both_T2[begin : begin + len(text) - 1]
        found.append(TextScores(part[:, 0], part[:, 1] > 0))
        begin += len(text)
    return found
