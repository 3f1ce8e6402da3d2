"""List the items of a short run on a GPU: their order, their seconds, and their bars.

This file imports nothing heavy: the driver reads it before the clock matters.
"""

from dataclasses import dataclass, field

LADDER_NAMES = {
    "chunked-loss": "+ chunked loss",
    "tiled-mlp": "+ tiled MLP",
    "full-recompute": "+ full recompute",
    "head-chunks": "+ head chunks",
    "attention-kept": "+ attention kept",
    "offload": "+ offload",
    "checkpointing": "transformers, checkpointing",
    "alst": "ALST's parts",
}
"""Item's name -> rung of memory.py, or peer of contenders.py."""
QWEN_LAYERS = 36
"""Layers of Qwen3-8B.

The peak of its rank grows by the same per layer from 3 layers on: with 2, nothing is on its way to
the host yet.
"""
ONE_B_LAYERS = 16


@dataclass(frozen=True)
class Bar:
    """Hold what a figure should reach."""

    limit: float
    at_least: bool = False

    def reached(self, value: float) -> bool:
        """Judge a figure."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.limit:g}"


@dataclass(frozen=True, kw_only=True)
class Item:
    """Describe one process of the run."""

    name: str
    title: str
    function: str
    """module:function, called as function(card, scale, report, **options)."""
    options: dict = field(default_factory=dict)
    seconds: int
    """Expected, with the start of the process: with less left the item is skipped. What it took on
    an H100 or H200, rounded up."""
    deadline: int
    """Seconds after which its process is ended."""
    by_hand: bool = False
    """Not in the lease: only by --only, with more time."""
    bars: dict[tuple[str, str], Bar] = field(default_factory=dict)
    """(case, figure) -> its bar; "" stands for every case."""


# It always runs first.
PROBE = Item(
    name="probe",
    title="the machine",
    function="tools.bench.gpu.checks:probe",
    seconds=15,
    deadline=60,
)
SHARE = {("", "share"): Bar(0.6, at_least=True)}
NO_FAILURE = {("", "failed"): Bar(0)}

# The most valuable first: time may end at any item. What no card has shown yet, and what missed its
# bar, comes before what was measured once and reached its own.
LEASE = (
    Item(
        # First whether the kernels are right.
        name="tests",
        title="tests/gpu",
        function="tools.bench.gpu.checks:gpu_tests",
        options={"compiled": False},
        seconds=60,
        deadline=120,
        bars=NO_FAILURE,
    ),
    Item(
        # Two of these failed when they last ran, and were mended since.
        name="tests-compiled",
        title="tests/gpu, what is compiled",
        function="tools.bench.gpu.checks:gpu_tests",
        options={"compiled": True},
        seconds=110,
        deadline=200,
        bars=NO_FAILURE,
    ),
    Item(
        # The rate that shares are shares of.
        name="product",
        title="8192^3 bf16 product",
        function="tools.bench.gpu.checks:product",
        seconds=13,
        deadline=40,
    ),
    Item(
        # Attention is nine tenths of a long sample's time.
        name="attention",
        title="attention of one Qwen3-8B rank, 262,144 tokens",
        function="tools.bench.gpu.attention:qwen_attention",
        options={"tokens": 1 << 18},
        seconds=27,
        deadline=70,
    ),
    Item(
        # The bar that is still missed.
        name="documents",
        title="131,072 tokens as one document and as many",
        function="tools.bench.gpu.attention:documents",
        options={"tokens": 1 << 17},
        seconds=42,
        deadline=90,
        bars={("", "ratio"): Bar(1.15)},
    ),
    Item(
        # The step that updates most weights for its tokens.
        name="3b-8k",
        title="3B, 1 sample of 8K",
        function="tools.bench.gpu.steps:ours",
        options={"model": "3b", "samples": 1, "backends": ["auto"]},
        seconds=36,
        deadline=80,
        bars=SHARE,
    ),
    Item(
        # The step that most people train.
        name="1b-8k",
        title="1B, 4 samples of 8K",
        function="tools.bench.gpu.steps:ours",
        options={"model": "1b", "samples": 4},
        seconds=52,
        deadline=100,
        bars=SHARE,
    ),
    Item(
        # Which norm a GPU should run.
        name="norm",
        title="norm, forward and backward",
        function="tools.bench.gpu.norm:norm",
        seconds=25,
        deadline=60,
    ),
    Item(
        name="frontier",
        title="8B, documents of 8K, + attention kept",
        function="tools.bench.gpu.frontier:point",
        options={"rung": "+ attention kept", "documents": 8},
        seconds=40,
        deadline=80,
    ),
)
"""The most valuable first; together with the probe they end within 9 minutes."""

BY_HAND = (
    Item(
        # From text to a verified export: six processes, each of which takes ten seconds to start.
        name="quickstart",
        title="the quick start on one device",
        function="tools.bench.gpu.quickstart:quickstart",
        seconds=160,
        deadline=240,
        by_hand=True,
    ),
    Item(
        # The longest sample that is planned for.
        name="qwen3-8b-rank",
        title="one rank of Qwen3-8B, cp 8, 1,048,576 tokens",
        function="tools.bench.gpu.long:qwen_rank",
        options={"tokens": 1 << 20, "layers": [3, 5]},
        seconds=113,
        deadline=200,
        by_hand=True,
        bars={
            (f"{QWEN_LAYERS} layers", "seconds"): Bar(250),
            (f"{QWEN_LAYERS} layers", "peak"): Bar(36),
        },
    ),
    Item(
        # A long sample on one card alone.
        name="1b-512k",
        title="1B, one document of 524,288 tokens",
        function="tools.bench.gpu.long:one_b",
        options={"tokens": 1 << 19, "layers": [2, 4]},
        seconds=104,
        deadline=170,
        by_hand=True,
        bars={(f"{ONE_B_LAYERS} layers", "seconds"): Bar(195)},
    ),
    Item(
        # The peer comes after ours: it says least by itself.
        name="1b-8k-peer",
        title="1B, 4 samples of 8K, transformers",
        function="tools.bench.gpu.steps:peer",
        options={"model": "1b", "samples": 4},
        seconds=50,
        deadline=120,
        by_hand=True,
    ),
    Item(
        name="3b-8k-peer",
        title="3B, 1 sample of 8K, transformers",
        function="tools.bench.gpu.steps:peer",
        options={"model": "3b", "samples": 1},
        seconds=90,
        deadline=240,
        by_hand=True,
    ),
    Item(
        name="qwen3-8b-rank-full",
        title="one rank of Qwen3-8B, cp 8, 1,048,576 tokens, all layers",
        function="tools.bench.gpu.long:qwen_rank",
        options={"tokens": 1 << 20, "layers": None},
        seconds=400,
        deadline=900,
        by_hand=True,
        bars={("", "seconds"): Bar(250), ("", "peak"): Bar(36)},
    ),
    Item(
        name="1b-512k-full",
        title="1B, one document of 524,288 tokens, all layers",
        function="tools.bench.gpu.long:one_b",
        options={"tokens": 1 << 19, "layers": None},
        seconds=300,
        deadline=600,
        by_hand=True,
        bars={("", "seconds"): Bar(195)},
    ),
    *(
        Item(
            name=f"8b-{name}",
            title=f"8B, longest sample of 8K documents, {rung}",
            function="tools.bench.gpu.frontier:search",
            options={"rung": rung},
            seconds=300,
            deadline=1800,
            by_hand=True,
        )
        for name, rung in LADDER_NAMES.items()
    ),
)
"""For --only and more time: what was measured once, and the table's other rows."""

ITEMS = {item.name: item for item in (*LEASE, *BY_HAND)}
"""In the order of the table."""
