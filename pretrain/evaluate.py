"""Validation loss: the same forward path as training, without gradients."""

import torch
from torch.distributed.fsdp import FSDPModule

from data.loader import Loader
from pretrain.step import Stepper


def validation_loss(stepper: Stepper, loader: Loader, tokens_per_epoch: int, max_batches: int,
                    device: torch.device) -> tuple[float, int]:
    """Mean loss in nats over the first batches of the validation stream -> (loss, targets counted).

    Args:
        loader: reads the validation stream in the current phase's shape.
        tokens_per_epoch: of all its sources; no more than these are read (but at least one batch).
    """
    batches = min(max_batches, max(1, tokens_per_epoch // loader.global_batch_tokens))
    loss_sum, targets = 0.0, 0
    for i in range(batches):
        microbatches = [batch.to(device) for batch in loader.read(i * loader.global_batch_tokens)]
        loss, count = stepper.run(microbatches, train=False)
        loss_sum, targets = loss_sum + loss * count, targets + count
    for unit in (unit for stage in stepper.stages for unit in stage.modules()):
        if isinstance(unit, FSDPModule):
            unit.reshard()  # training and checkpoints expect the shards
    return loss_sum / max(1, targets), targets
