"""`--all` runs the long suites too; tests that need a GPU are skipped where there is none."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the long suites too")


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
