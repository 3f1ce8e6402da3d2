"""What devices can do, from their data sheets.

One table, for the share of a GPU's rate that a run uses and for the choice of layouts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Describes one kind of device, of which up to eight stand in a node."""

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


# Sources: NVIDIA's data sheets (H200, H100 SXM, A100 80GB SXM, HGX B200) for memory, its bandwidth,
# dense bf16 and NVLink (published as the sum of both directions); DGX data sheets for the network
# cards (400 Gb/s per GPU, DGX A100 200 Gb/s). The H800 and A800 are the H100 and the A100 with
# NVLink cut to 400 GB/s.
TABLE = {
    hardware.name: hardware
    for hardware in (
        Hardware("H200", 141 * 10**9, 989e12, 4.8e12, 450e9, 50e9),
        Hardware("H100", 80 * 10**9, 989e12, 3.35e12, 450e9, 50e9),
        Hardware("H800", 80 * 10**9, 989e12, 3.35e12, 200e9, 50e9),
        Hardware("A100", 80 * 10**9, 312e12, 2.039e12, 300e9, 25e9),
        Hardware("A800", 80 * 10**9, 312e12, 2.039e12, 200e9, 25e9),
        Hardware("B200", 180 * 10**9, 2250e12, 8e12, 900e9, 50e9),
    )
}
"""GPUs by a part of the name that they report."""
# No data sheet: a core and a loopback's order of magnitude, so that computing and sending weigh
# about as on a GPU.
CPU = Hardware("cpu", None, 100e9, 20e9, 2e9, 1e9)


def find_hardware(device_name: str) -> Hardware | None:
    """Find the row of a device by a part of its name, case aside; None where it is not known."""
    return next((row for name, row in TABLE.items() if name in device_name.upper()), None)


def peak_flops(device_name: str) -> float | None:
    """Return the device's dense bf16 rate in FLOP/s, or None where it is not known."""
    known = find_hardware(device_name)
    return known.flops if known else None
