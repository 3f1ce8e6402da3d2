"""What all tests share: `--all` for the long ones, the pool of worker processes, how tests are
spread over two processes of pytest, and tables for the end of the output."""

import gc

import pytest

TABLES = pytest.StashKey[list[str]]()
"""Tables that tests leave for the end of the session's output."""


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the long suites too")


def pytest_configure(config):
    config.stash[TABLES] = []


def pytest_collection_modifyitems(config, items):
    skip_without_gpu([item for item in items if "gpu" in item.keywords])
    if not config.getoption("--all"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: run with --all"))
    alone = {item.nodeid.split("::")[0] for item in items if "pool" in item.fixturenames}
    outside = sorted(file for file in alone if scope_of(file) != POOL_SCOPE)
    if outside:
        raise pytest.UsageError(f"{outside} use the pool: name them in tests/conftest.py: scope_of")


def pytest_collection_finish():
    """Spare later collections of garbage the walk over all that is imported by now."""
    gc.collect()
    gc.freeze()


def skip_without_gpu(items):
    if not items:
        return
    import torch  # seconds: only when a test asks for it

    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# -- two processes of pytest (pytest-xdist): one for every test of the pool, one for the rest

POOL_SCOPE = "pool"


def scope_of(nodeid: str) -> str:
    """Name what must run in one process of pytest: all tests of the pool, or those of a file."""
    file = nodeid.split("::")[0]
    of_pool = ("tests/dist/", "tests/mutations/", "tests/faults/test_crossing")
    uses_pool = file.startswith((*of_pool, "tests/faults/test_watchdog"))
    return POOL_SCOPE if uses_pool else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return scope_of(nodeid)

    return ByScope(config, log)


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


# -- tables for the end of the output


@pytest.fixture(scope="module")
def show_table(request):
    """Takes a text that is printed after the tests, beside their durations."""
    return request.config.stash[TABLES].append


def pytest_sessionfinish(session):
    # A worker of pytest-xdist prints nothing: it hands its tables to the process that does.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tables"] = session.config.stash[TABLES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[TABLES] += getattr(node, "workeroutput", {}).get("tables", [])


def pytest_terminal_summary(terminalreporter, config):
    for table in config.stash[TABLES]:
        terminalreporter.write_line(f"\n{table}")
