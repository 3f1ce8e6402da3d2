"""Two networks on this machine that one wire joins, for tests of what happens between nodes."""

import os
import shutil
import subprocess

import pytest


def can_make_networks() -> bool:
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        return False
    command = "ip link add ithaca-a type veth peer name ithaca-b && ip link del ithaca-a"
    return (
        subprocess.run(["unshare", "-n", "sh", "-c", command], capture_output=True).returncode == 0
    )


@pytest.fixture
def networks():
    """Make two networks that one wire joins -> their names."""
    if not can_make_networks():
        pytest.skip("needs root, iproute2 and network namespaces")
    names = [f"ithaca-{os.getpid()}-{letter}" for letter in "ab"]
    wire = (("eth7", "10.77.0.1/24"), ("bond0.7", "10.77.0.2/24"))
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        ends = f"eth7 netns {names[0]} type veth peer name bond0.7 netns {names[1]}"
        subprocess.run(["ip", "link", "add", *ends.split()], check=True)
        for name, (interface, address) in zip(names, wire, strict=True):
            for words in (
                f"addr add {address} dev {interface}",
                f"link set {interface} up",
                "link set lo up",
            ):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
