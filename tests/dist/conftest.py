import pytest

from tests.dist.pool import WorkerPool


@pytest.fixture(scope="session")
def pool():
    """Workers shared by all distributed tests of the session."""
    workers = WorkerPool()
    yield workers
    workers.close()
