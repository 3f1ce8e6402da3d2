"""The parity suite must fail when a known bug is put back: a suite that cannot fail proves
nothing."""

import pytest

from parallel.layout import World
from tests.dist.parity import Case, check_replicas_equal, compare, run_step
from tests.mutations.mutations import MUTATIONS

CASES = {repr(mutation.case): mutation.case for mutation in MUTATIONS.values()}


def run_mutated(world: World, case: Case, name: str) -> dict:
    with MUTATIONS[name].applied():
        return run_step(world, case)


@pytest.fixture(scope="module")
def caught(show_table):
    """Mutation -> what caught it; printed after the tests."""
    found: dict[str, str] = {}
    yield found
    lines = [f"{len(found)} of {len(MUTATIONS)} mutations caught"]
    lines += [f"  {name:<84} {message}" for name, message in found.items()]
    show_table("\n".join(lines))


@pytest.mark.parametrize("case", CASES.values(), ids=range(len(CASES)))
def test_the_case_passes_without_a_mutation(pool, single, case):
    """Otherwise a case that always fails would catch everything."""
    results = pool.run(run_step, case.world_size, case)
    compare(results, single(case))
    check_replicas_equal(results)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_parity_suite_notices(pool, single, caught, name):
    case = MUTATIONS[name].case
    expected = single(case)
    # Outside of `raises`: a mutation that crashes proves nothing.
    results = pool.run(run_mutated, case.world_size, case, name)
    # A wrong value of some rank, not a complaint of the comparison about its own inputs.
    with pytest.raises(AssertionError, match=r"^(rank \d+: |replicas of )") as found:
        compare(results, expected)
        check_replicas_equal(results)
    caught[name] = str(found.value).splitlines()[0][:90]
