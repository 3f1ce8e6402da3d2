from tests.dist.conftest import pool  # noqa: F401  (the same workers)
