"""The order in which the samples of a packed window are drawn: at random, or by like cost.

A step waits for its most expensive sample, and a long document makes a sample that no packing can
make cheaper. Where such samples come in the same steps, all other steps are done sooner. Which step
of a window gets the expensive samples is random.
"""

import numpy as np

from data.permutation import Permutation

ORDER_PURPOSE = 3
"""Keeps the seed of the order of samples apart from those in stream.py."""
STEP_PURPOSE = 4
"""Keeps the seed of the ranks of steps apart from those of all other orders."""
STEPS = 2**32
"""Steps that have a rank of their own; those after them have the ranks of the first ones again."""


def random_places(count: int, seed: int, low: int, seq_length: int) -> np.ndarray:
    """Give each of a window's samples a place in a random order -> int64 [samples].

    Args:
        seed, low, seq_length: the stream's, the window's place in it and a sample's tokens: what
            makes one window's order differ from another's.
    """
    return Permutation.make(count, seed, ORDER_PURPOSE, low, seq_length).values(0, count)


def places_by_step(
    costs: np.ndarray, steps: np.ndarray, places: np.ndarray, seed: int
) -> np.ndarray:
    """Give each of a window's samples a place such that steps get samples of like cost.

    Steps that reach into the window before or after get the cheapest samples, since the samples
    from there cost something else.

    Args:
        costs: float64 [samples].
        steps: the step of each place, and before and after them those of the source's neighbouring
            samples, int64 [samples + 2]; -1 where there is none.
        places: a random order of the samples.
        seed: of the order of steps; sources of one seed have their expensive samples in the same
            steps.

    Returns:
        int64 [samples], a permutation.
    """
    count = len(costs)
    own = steps[1:-1]
    is_shared = (own == steps[0]) | (own == steps[-1])
    if is_shared.all():
        return places
    # Which step comes first when the most expensive samples are given out. Of a source with a tiny
    # share a window reaches over very many steps: only those that get a sample of it are looked at.
    ranks = Permutation.make(STEPS, seed, STEP_PURPOSE).values_of(own % STEPS)
    rank_of_place = np.where(is_shared, STEPS, ranks)
    # Within a step the order stays random.
    by_rank = places[np.argsort(rank_of_place[places], kind="stable")]
    found = np.empty(count, dtype=np.int64)
    found[np.argsort(-costs, kind="stable")] = by_rank
    return found
