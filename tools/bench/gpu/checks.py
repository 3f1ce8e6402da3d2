"""Check what is installed, run the tests on a GPU, and measure the card's rate of products."""

import importlib
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from tools.bench.fresh import ROOT
from tools.bench.gpu.lines import Report
from tools.bench.gpu.parts import GIB, Card, Scale

IMPORTED = {"numba": "numba", "megatron.core": "megatron-core"}
"""Module -> package of those that may be installed and refuse, numba for the numpy beside it."""
PACKAGES = (
    "numpy",
    "triton",
    "transformers",
    "tyro",
    "xxhash",
    "PyYAML",
    "orjson",
    "sentencepiece",
    "safetensors",
    "tqdm",
    "einops",
    "pytest",
    "liger-kernel",
)
"""Further packages that items need."""
OPTIONAL = (
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "nvidia-cudnn-frontend",
    "transformer-engine",
)
"""Packages of further attention backends; the items that need one say where it is missing."""
COMPILED_FILES = ("test_step.py", "test_optimizer_offload.py")
"""Files of tests/gpu that compile kernels or start processes which do: 97 of 152 seconds on a
machine that has compiled nothing yet."""


def probe(card: Card, scale: Scale, report: Report) -> None:
    """Report the card's memory, the versions, and in one line each what is missing or refuses."""
    # The first thing that a broken machine refuses.
    torch.ones(1 << 20, device=card.device)
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for module, package in IMPORTED.items():
        with report.trying(package):
            importlib.import_module(module)
            found[package] = version(package)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            report.fail("not installed", case=package)
    for package in OPTIONAL:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    report.add("memory", card.capacity() / GIB, "GiB")
    report.add("versions", ", ".join(f"{name} {number}" for name, number in found.items()))


def product(card: Card, scale: Scale, report: Report) -> None:
    """Report the rate of a matrix product, which the other items' rates are shares of."""
    report.add("rate", card.product_tflops(scale), "TFLOP/s")


class Recorder:
    """Write failed tests as they fail, and each file's counts at its end: a pytest plugin."""

    def __init__(self, report: Report):
        self.report = report
        self.file = ""
        self.counts: dict[str, int] = {}

    def pytest_runtest_logreport(self, report) -> None:
        """Count a test by its call; by setup and teardown where they fail or skip."""
        file = report.nodeid.partition("::")[0].rpartition("/")[2]
        # Files run one after another: another one ends the one before.
        if file != self.file:
            self.end_file()
            self.file = file
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
        if report.failed:
            lines = str(report.longrepr).splitlines()
            reasons = [line[1:].strip() for line in lines if line.startswith("E ")] or lines[-1:]
            self.report.add(
                "test",
                report.nodeid.partition("::")[2],
                case=self.file,
                kind="failed",
                note=" ".join(reasons[:1])[:300],
            )

    def end_file(self) -> None:
        """Write the counts of the file that is over."""
        for outcome in ("passed", "failed", "skipped"):
            if self.file:
                self.report.add(outcome, self.counts.get(outcome, 0), "tests", case=self.file)
        self.counts = {}

    def pytest_sessionfinish(self) -> None:
        """Write the counts of the last file."""
        self.end_file()


def gpu_tests(card: Card, scale: Scale, report: Report, *, compiled: bool) -> None:
    """Run the files of tests/gpu that compile, or all others; what failed is a line by its name."""
    import pytest

    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    chosen = [path for path in files if (path.name in COMPILED_FILES) == compiled]
    # No cache: nothing is written into the tree.
    options = ["-q", "--tb=short", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *map(str, chosen)], plugins=[Recorder(report)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        report.fail(f"pytest ended with {pytest.ExitCode(code).name}: log.txt says why")
