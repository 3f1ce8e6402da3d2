"""What devices can do, from their data sheets, and which share of it a run reaches.

One table, for the share of a GPU's rate that a run uses, for the choice of layouts and for plans.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Says which shares of a device's rates a run reaches.

    The defaults of computing are those of one H100, for flash_attention of one H200 (torch 2.11;
    tools/bench/RESULTS.md, "On one NVIDIA ..."). They are taken for every device: nothing else has
    been measured.
    """

    products: float = 0.55
    """Share of the data sheet's FLOP/s of matrix products, with the norms, gates and copies between
    them.

    Measured as what a step leaves beside its attention and its update: 0.53 (Qwen3-8B on 131,072
    tokens a rank), 0.52 (3B on 8,192), 0.59 (1B on 32,768).
    """
    attention: Mapping[int, float] = field(default_factory=lambda: {64: 0.35, 128: 0.46})
    """Share of the data sheet's FLOP/s of attention by cuDNN, by head size; a backward counts as
    two forwards.

    Measured inside a step: 457 TFLOP/s with heads of 128 on 1,048,576 tokens, 344 with heads of 64
    on 524,288 and 369 on 131,072.
    """
    varlen_attention: Mapping[int, float] = field(default_factory=lambda: {64: 0.23, 128: 0.28})
    """The same of torch's varlen op (FlashAttention 2).

    Measured alone: 279 TFLOP/s with heads of 128 on one document of 262,144 tokens, 228 with heads
    of 64 on one of 16,128.
    """
    flash_attention: Mapping[int, float] = field(default_factory=lambda: {64: 0.46, 128: 0.53})
    """The same of flash-attn's own release for Hopper and later.

    Measured inside a step on an H200 with FlashAttention 4: 529 TFLOP/s with heads of 128 on
    1,048,576 tokens, 457 with heads of 64 on 131,072.
    """
    loss: float | None = None
    """Share of the data sheet's FLOP/s of the logits' products, with softmax and loss between them;
    None = as `products`."""
    memory: float = 0.85
    """Share of the memory's bandwidth that the update reaches. Assumed, not measured."""
    links: float = 0.8
    """Share of a link's bytes per second that a collective reaches. Assumed, not measured."""
    overlap_slowdown: float = 0.2
    """Time that computing loses while a transfer runs beside it, over the transfer's time.

    Both use the device's memory and multiprocessors. Assumed, not measured.
    """
    exchanges: float | None = None
    """Share of a link's bytes per second that all-to-alls and sends reach; None = as `links`."""
    reductions: float | None = None
    """The same of reduce-scatters; None = as `links`."""
    pointwise: float | None = None
    """Share of the memory's bandwidth that norms, gates, rotations and the loss reach.

    None = their time is in `products`, as where `products` was measured inside a step.
    """
    weights: float | None = None
    """Share of the memory's bandwidth that copies of weights reach; None = as `memory`."""
    layer_overhead_seconds: float = 0.0
    """Time of a layer's forward and backward in which the device waits for the host's calls.

    0 = the host runs ahead, as it does of a GPU with long samples.
    """
    step_factor: float = 1.0
    """What a step takes over the sum of its parts: ranks wait for each other, and memory is written
    for the first time. 1 = nothing, as long as it is not measured."""
    collective_latency_seconds: float = 15e-6
    """Time that a collective takes before its first byte, for each doubling of its size. Assumed,
    not measured."""

    def of_attention(self, head_size: int, backend: str) -> float:
        """Return the share that attention reaches with heads of this size.

        Args:
            backend: the setting attention_backend; all but `varlen` and `flash` count as cuDNN.
        """
        measured = {"varlen": self.varlen_attention, "flash": self.flash_attention}
        by_head_size = measured.get(backend, self.attention)
        # A head size between two that were measured counts as the smaller one.
        reached = [size for size in by_head_size if size <= head_size]
        return by_head_size[max(reached, default=min(by_head_size))]


@dataclass(frozen=True)
class Hardware:
    """Describes one kind of device, and the nodes that it stands in."""

    name: str
    memory_bytes: int | None
    """Memory of one device; None = the machine's own, shared by its processes."""
    flops: float
    """Dense bf16 FLOP/s."""
    memory_bytes_per_second: float
    """Between the device and its own memory."""
    node_bytes_per_second: float
    """From one device to the others of its node, one direction."""
    network_bytes_per_second: float
    """From one device to other nodes, one direction: a network card for each device."""
    devices_per_node: int = 8
    fp32_flops: float | None = None
    """FLOP/s of fp32 products, whose factors are not rounded to TF32; None = as `flops`."""
    peer_bytes_per_second: float | None = None
    """From one device to one other of its node, one direction; None = all of it, by a switch."""
    host_bytes_per_second: float = 64e9
    """Between the device and its host's memory, one direction."""
    crowding: float = 1.0
    """Threads of all processes over the cores, at which a CPU's rates were measured.

    Above 1 the cores of a process that waits compute for the others.
    """
    efficiency: Efficiency = Efficiency()

    @property
    def reduction_share(self) -> float:
        """Share of a link's bytes per second that reduce-scatters reach."""
        return self.efficiency.reductions or self.efficiency.links

    @property
    def exchange_share(self) -> float:
        """Share of a link's bytes per second that all-to-alls and sends reach."""
        return self.efficiency.exchanges or self.efficiency.links

    def product_flops(self, element_bytes: int) -> float:
        """Return the dense FLOP/s of products of elements of this size; fp64 counts as fp32."""
        is_narrow = element_bytes <= 2
        return self.flops if is_narrow else self.fp32_flops or self.flops

    @property
    def is_cpu(self) -> bool:
        """Do its processes share the memory of the machine?"""
        return self.memory_bytes is None

    def rate_inside_node(self, peers: int) -> float:
        """Return the bytes per second from one device to `peers` others of its node together."""
        if self.peer_bytes_per_second is None:
            return self.node_bytes_per_second
        return min(self.node_bytes_per_second, peers * self.peer_bytes_per_second)


# Sources: NVIDIA's data sheets (H200, H100 SXM, A100 80GB SXM, HGX B200) for memory, its bandwidth,
# dense bf16, fp32 and NVLink (published as the sum of both directions); DGX data sheets for the
# network cards (400 Gb/s per GPU, DGX A100 200 Gb/s). The H800 and A800 are the H100 and the A100
# with NVLink cut to 400 GB/s. AMD's data sheet (Instinct MI300X) for its memory, dense bf16, fp32
# and Infinity Fabric: a link of 128 GB/s, both directions together, to each of the 7 others; 400
# Gb/s per GPU as in AMD's reference design. To the host: PCIe 5 x16 (64 GB/s one direction), of the
# A100 and A800 PCIe 4 x16.
_ROWS = (
    Hardware("H200", 141 * 10**9, 989e12, 4.8e12, 450e9, 50e9, fp32_flops=67e12),
    Hardware("H100", 80 * 10**9, 989e12, 3.35e12, 450e9, 50e9, fp32_flops=67e12),
    Hardware("H800", 80 * 10**9, 989e12, 3.35e12, 200e9, 50e9, fp32_flops=67e12),
    Hardware(
        "A100",
        80 * 10**9,
        312e12,
        2.039e12,
        300e9,
        25e9,
        fp32_flops=19.5e12,
        host_bytes_per_second=32e9,
    ),
    Hardware(
        "A800",
        80 * 10**9,
        312e12,
        2.039e12,
        200e9,
        25e9,
        fp32_flops=19.5e12,
        host_bytes_per_second=32e9,
    ),
    Hardware("B200", 180 * 10**9, 2250e12, 8e12, 900e9, 50e9, fp32_flops=75e12),
    Hardware(
        "MI300X",
        192 * 10**9,
        1307.4e12,
        5.3e12,
        7 * 64e9,
        50e9,
        fp32_flops=163.4e12,
        peer_bytes_per_second=64e9,
    ),
)
TABLE = {hardware.name: hardware for hardware in _ROWS}
"""GPUs by a word of the name that they report."""
# No data sheet: a core and a loopback's order of magnitude, so that computing and sending weigh
# about as on a GPU.
CPU = Hardware("cpu", None, 100e9, 20e9, 2e9, 1e9, host_bytes_per_second=20e9)


def find_hardware(device_name: str) -> Hardware | None:
    """Find the row of a device by a word of its name, case aside; None where it is not known."""
    # As a word: a GH200 is no H200, and an A100X no A100.
    words = re.split(r"\W+", device_name.upper())
    return next((row for name, row in TABLE.items() if name in words), None)


def peak_flops(device_name: str) -> float | None:
    """Return the device's dense bf16 rate in FLOP/s, or None where it is not known."""
    known = find_hardware(device_name)
    return known.flops if known else None
