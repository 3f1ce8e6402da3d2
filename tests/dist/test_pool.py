"""The workers of the tests: a world that has ended leaves nothing behind in them."""

from pathlib import Path

import pytest

from parallel.layout import World
from tests.dist.parity import Case, run_built

TASKS = Path("/proc/self/task")


def train(world: World, case: Case) -> None:
    run_built(case, case.build(world))


def count_loops(world: World) -> int:
    """Count the threads in which gloo waits for others: one for each group that is alive."""
    names = [(task / "comm").read_text() for task in TASKS.iterdir()]
    return names.count("gloo_tcp_loop\n")


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted on Linux")
def test_a_world_that_has_ended_leaves_no_groups(pool):
    case = Case(dp=2)
    pool.run(train, 2, case)
    first = pool.run(count_loops, 2)
    for _ in range(3):
        pool.run(train, 2, case)
    for count, at_first in zip(pool.run(count_loops, 2), first, strict=True):
        assert count <= at_first
