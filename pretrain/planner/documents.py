"""What the documents of a phase do to its steps: how far a token sees, who waits for whom."""

from dataclasses import dataclass

import numpy as np

from data.dealing import StepShape, deal, imbalance


class StepCosts:
    """Holds what the samples of a phase's first steps cost, and compares data ranks by it."""

    def __init__(self, costs: np.ndarray):
        """
        Args:
            costs: FLOPs of forward and backward, float64 [steps, samples of a step], in the order
                of the stream.
        """
        self.costs = costs
        # A search asks for the same shape again with every strategy and level of recompute.
        self._known: dict[tuple[StepShape, bool], float] = {}

    @property
    def steps(self) -> int:
        """Steps that were drawn."""
        return len(self.costs)

    def extra_per_sample(self, shape: StepShape, *, is_dealt: bool) -> float:
        """Return what the steps wait for beyond the mean data rank, over the samples of a rank."""
        # The mean rank has samples of the mean cost.
        more = self.slowest_over_mean(shape, is_dealt=is_dealt) - 1
        return more * float(self.costs.mean())

    def slowest_over_mean(self, shape: StepShape, *, is_dealt: bool) -> float:
        """Compare what the steps wait for with the mean of the data ranks: 1.0 = nobody waits.

        Args:
            is_dealt: by cost; otherwise in the order of the stream.
        """
        key = (shape, is_dealt)
        if key not in self._known:
            found = [
                imbalance(step, deal(step, shape) if is_dealt else None, shape)
                for step in self.costs
            ]
            # Steps with more work count for more.
            self._known[key] = float(np.average(found, weights=self.costs.sum(axis=1)))
        return self._known[key]


@dataclass(frozen=True)
class PhaseDocuments:
    """Says what is known of the documents of a phase before it is trained."""

    pairs_per_token: float | None = None
    """Tokens that a token sees on average over the layers; None = each sample is one document."""
    costs: StepCosts | None = None
    """None = the samples of a step are taken as equal."""
    is_dealt: bool = True
    """Will a step's samples be dealt to the data ranks by their cost?"""
    why_equal: str = "documents are not known"
    """Why there are no costs, in words."""

    def slowest_over_mean(self, shape: StepShape) -> float:
        """Return the work of the data rank that a step waits for over that of the average one."""
        if self.costs is None:
            return 1.0
        return self.costs.slowest_over_mean(shape, is_dealt=self.is_dealt)

    def extra_flops_per_sample(self, shape: StepShape) -> float:
        """Return the FLOPs of the data rank that a step waits for beyond those of the average one.

        They are of forward and backward, over the samples of a rank.
        """
        if self.costs is None:
            return 0.0
        return self.costs.extra_per_sample(shape, is_dealt=self.is_dealt)


UNKNOWN_DOCUMENTS = PhaseDocuments()
"""Where nothing is known, every sample is one document."""
