"""The parity suite must fail when a known bug is put back: a suite that cannot fail proves
nothing."""

import pytest

from parallel.layout import World
from tests.dist.parity import Case, check_replicas_equal, compare, run_step
from tests.mutations.mutations import MUTATIONS


def run_mutated(world: World, case: Case, name: str) -> dict:
    with MUTATIONS[name].applied():
        return run_step(world, case)


caught: dict[str, str] = {}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_parity_suite_notices(pool, single, name):
    case = MUTATIONS[name].case
    expected = single(case)
    results = pool.run(
        run_mutated, case.world_size, case, name
    )  # outside: a mutation that crashes proves nothing
    with pytest.raises(AssertionError) as found:
        compare(results, expected)
        check_replicas_equal(results)
    caught[name] = str(found.value).splitlines()[0][:90]


def test_table_of_mutations(capsys):
    """Prints mutation -> what caught it."""
    if len(caught) < len(MUTATIONS):
        pytest.skip("only part of the mutations ran")
    with capsys.disabled():
        print(f"\n{len(caught)} of {len(MUTATIONS)} mutations caught")
        for name, message in caught.items():
            print(f"  {name:<84} {message}")
    assert len(caught) == len(MUTATIONS) >= 15
