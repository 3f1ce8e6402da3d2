"""An independent oracle: transformers trained by plain PyTorch, in fp64.

It shares only the data pipeline with us (labels and document pieces; tests/unit/test_batch.py
checks those against the definition): each document piece of a sample goes through transformers by
itself, the losses are summed and divided by the number of targets, and torch.optim.AdamW updates.
"""

import torch

from data.batch import IGNORE, read_batch
from pretrain.config.config import OptimizerConfig
from tests.dist.parity import Case, memory_stream
from tests.documents import windows
from tools.huggingface.double import KeepDouble


def widen_parameters(model: torch.nn.Module) -> None:
    """Make the weights fp64; the rope's frequencies stay fp32, as ours."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()


def train_transformers(model, case: Case, steps: int, learning_rate: float) -> list[float]:
    """Losses of the steps on the case's batches; the model is trained in place, in fp64."""
    ours = OptimizerConfig()
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in model.parameters() if p.dim() > 1],
                "weight_decay": ours.weight_decay,
            },
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(ours.adam_beta1, ours.adam_beta2),
        eps=ours.adam_eps,
    )
    losses = []
    for step in range(steps):
        with KeepDouble():
            loss = _loss_of_step(model, case, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _loss_of_step(model, case: Case, step: int) -> torch.Tensor:
    """Mean loss over the targets of one step's samples."""
    stream = memory_stream(case.lengths, 1234)
    loss = torch.zeros((), dtype=torch.float64)
    targets = 0
    for sample in range(case.samples):
        start = (step * case.samples + sample) * case.seq_length
        batch = read_batch(windows(stream, [start], case.seq_length), case.seq_length)
        bounds = batch.cu_seqlens.tolist()
        for a, b in zip(bounds, bounds[1:], strict=False):
            logits = model(input_ids=batch.tokens[None, a:b], use_cache=False).logits[0]
            loss = loss + torch.nn.functional.cross_entropy(
                logits, batch.labels[a:b], ignore_index=IGNORE, reduction="sum"
            )
            targets += int((batch.labels[a:b] != IGNORE).sum())
    return loss / targets
