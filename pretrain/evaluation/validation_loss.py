"""The loss of a validation set: a mean over targets that depends on no layout."""

import dataclasses

from data.batch import IGNORE, Batch
from data.loader import Loader
from pretrain.step import Stepper


def validation_loss(stepper: Stepper, loader: Loader, samples: int) -> tuple[float, int]:
    """Compute the mean loss over the targets of the loader's first `samples`; collective.

    The last batch may hold more samples: their targets are taken out.

    Returns:
        The loss in nats, 0 without any target; the number of targets.
    """
    batch_samples = loader.global_batch_tokens // loader.seq_length
    loss_sum = 0.0
    targets = 0
    for first in range(0, samples, batch_samples):
        microbatches = []
        for j, batch in enumerate(loader.read(first * loader.seq_length)):
            # The loader deals microbatches to the data-parallel ranks in turn.
            number = j * loader.dp_size + loader.dp_rank
            begin = first + number * loader.micro_batch_size
            kept = _keep_samples(batch, samples - begin, loader)
            microbatches.append(kept.to(stepper.layout.device))
        loss, count = stepper.run(microbatches, train=False)
        loss_sum += loss * count
        targets += count
    return loss_sum / max(1, targets), targets


def _keep_samples(batch: Batch, count: int, loader: Loader) -> Batch:
    """Take the targets out of all but the first `count` samples of a microbatch."""
    if count >= loader.micro_batch_size:
        return batch
    labels = batch.labels.clone()
    end_of_kept = count * loader.seq_length
    at = 0
    # This rank's slice consists of pieces [low, high) of the whole microbatch.
    for low, high in loader.pieces:
        kept = min(max(end_of_kept - low, 0), high - low)
        labels[at + kept : at + high - low] = IGNORE
        at += high - low
    return dataclasses.replace(batch, labels=labels, num_targets=-1)
