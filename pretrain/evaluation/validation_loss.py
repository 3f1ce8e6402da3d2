"""The loss of a validation set: a mean over targets that depends on no layout."""

import dataclasses

import numpy as np
import torch

from data.batch import IGNORE, Batch
from data.loader import Loader
from pretrain.processes.deals import require_same_deals
from pretrain.step import Stepper


def validation_loss(stepper: Stepper, loader: Loader, samples: int) -> tuple[float, int]:
    """Compute the mean loss over the targets of the loader's first `samples`; collective.

    The last batch may hold more samples: their targets are taken out.

    Returns:
        The loss in nats, 0 without any target; the number of targets.

    Raises:
        Refused: ranks found the samples dealt in different ways; on all ranks.
    """
    batch_samples = loader.global_batch_tokens // loader.seq_length
    loss_sum = 0.0
    targets = 0
    slots = []
    for first in range(0, samples, batch_samples):
        microbatches = []
        batches = loader.read(first * loader.seq_length)
        slots.append(loader.dealt.slots)
        for batch, numbers in zip(batches, loader.own_samples(), strict=True):
            kept = _keep_samples(batch, first + numbers < samples, loader)
            microbatches.append(kept.to(stepper.layout.device))
        loss, count = stepper.run(microbatches, train=False)
        loss_sum += loss * count
        targets += count
    if loader.dealing is not None and slots:
        require_same_deals(slots, stepper.layout, "an evaluation")
    return loss_sum / max(1, targets), targets


def _keep_samples(batch: Batch, is_kept: np.ndarray, loader: Loader) -> Batch:
    """Take the targets out of those samples of a microbatch that are not kept.

    Args:
        is_kept: bool [micro_batch_size].
    """
    if is_kept.all():
        return batch
    # This rank's slice consists of pieces [low, high) of the whole microbatch.
    of_token = np.repeat(is_kept, loader.seq_length)
    of_slice = np.concatenate([of_token[low:high] for low, high in loader.pieces])
    labels = batch.labels.where(torch.from_numpy(of_slice), IGNORE)
    return dataclasses.replace(batch, labels=labels, num_targets=-1)
