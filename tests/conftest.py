"""`--all` runs the long suites too; tests that need a GPU are skipped where there is none."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the long suites too")


TABLES = pytest.StashKey[list[str]]()
"""Tables that tests leave for the end of the session's output."""


def pytest_configure(config):
    config.stash[TABLES] = []


def pytest_terminal_summary(terminalreporter, config):
    for table in config.stash[TABLES]:
        terminalreporter.write_line(f"\n{table}")


@pytest.fixture(scope="module")
def show_table(request):
    """Takes a text that is printed after the tests, beside their durations."""
    return request.config.stash[TABLES].append


def pytest_collection_modifyitems(config, items):
    gpu = [item for item in items if "gpu" in item.keywords]
    if gpu:
        import torch  # seconds: only when a test asks for it

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not config.getoption("--all"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: run with --all"))


@pytest.fixture(scope="session")
def pool():
    """Worker processes shared by all distributed tests of the session (tests/dist/pool.py)."""
    from tests.dist.pool import WorkerPool

    workers = WorkerPool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def single(pool):
    """Case -> results of one process on the same model and batch, computed once."""
    from tests.dist.parity import run_step

    known = {}

    def get(case) -> dict:
        key = repr(case.single())
        if key not in known:
            known[key] = pool.run(run_step, 1, case.single())[0]
        return known[key]

    return get
