"""Choose the network interface over which gloo and NCCL connect the processes of several nodes.

By itself gloo tells its peers the address of this machine's own host name, which Debian's
/etc/hosts maps to 127.0.1.1. The interface that reaches node 0 is one on which node 0 can answer.
"""

import array
import fcntl
import ipaddress
import os
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

SIOCGIFCONF = 0x8912
"""Linux's request number for the IPv4 addresses of all interfaces."""
IFREQ_BYTES = 40
"""The size of one entry of the answer, a C `struct ifreq`."""
NAME_BYTES = 16
"""The size of the interface's name in it."""
IPV6_TABLE = Path("/proc/net/if_inet6")
ELSEWHERE = "192.0.2.1"
"""An address that is reserved for documentation, so only the default route leads to it."""
NAMES_OF_THIS_MACHINE = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
RESOLVE_SECONDS = 20.0
"""The seconds for which a name server that does not answer is asked again."""
PORT_SECONDS = 5.0
"""The seconds that node 0 waits for its port: a launch that was just killed may still hold it."""


@dataclass(frozen=True)
class Interface:
    """Describes one network interface of this machine, and why it was chosen."""

    name: str
    address: str
    reason: str


def resolve(name: str, wait: float = RESOLVE_SECONDS) -> list[str]:
    """Look up the addresses of a host name, in the resolver's order.

    Raises:
        ValueError: it has none, or no name server answers within `wait` seconds.
    """
    limit = time.monotonic() + wait
    while True:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            addresses = [str(socket_address[0]) for *_, socket_address in found]
            return list(dict.fromkeys(addresses))  # each once, in this order
        except (socket.gaierror, UnicodeError) as error:
            may_come = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            if not may_come or time.monotonic() >= limit:
                reason = error.strerror if isinstance(error, socket.gaierror) else str(error)
                raise ValueError(
                    f"MASTER_ADDR = {name}: must be a name or an address that this machine can "
                    f"resolve ({reason}). Fix: node 0's address, or its name in DNS or /etc/hosts."
                ) from None
            time.sleep(1)


def local_addresses() -> dict[str, str]:
    """Map each address of this machine to the name of its interface."""
    return _ipv4_addresses() | _ipv6_addresses()


def _ipv4_addresses() -> dict[str, str]:
    # The kernel fills a buffer of ours: the request holds the buffer's size and place.
    buffer = array.array("B", bytes(IFREQ_BYTES * 1024))
    place, size = buffer.buffer_info()
    request = struct.pack("iL", size, place)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        filled, _ = struct.unpack("iL", fcntl.ioctl(asker, SIOCGIFCONF, request))
    found = {}
    for start in range(0, filled, IFREQ_BYTES):
        entry = buffer[start : start + IFREQ_BYTES].tobytes()
        label = entry[:NAME_BYTES].split(b"\0", 1)[0].decode()
        # After the name comes a sockaddr_in: family and port in 4 bytes, then the address.
        address = socket.inet_ntoa(entry[NAME_BYTES + 4 : NAME_BYTES + 8])
        found[address] = label.split(":")[0]  # "eth0:1" is a second address of eth0
    return found


def _ipv6_addresses() -> dict[str, str]:
    if not IPV6_TABLE.exists():  # a kernel without IPv6
        return {}
    found = {}
    for line in IPV6_TABLE.read_text().splitlines():
        # 32 hexadecimal digits, four numbers, the interface.
        digits, *_, name = line.split()
        found[str(ipaddress.IPv6Address(bytes.fromhex(digits)))] = name
    return found


def own_address_towards(address: str) -> str | None:
    """Return the address from which this machine sends to `address`; None without a route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        try:
            sender.connect((address, 9))  # a datagram socket: nothing is sent
        except OSError:
            return None
        return sender.getsockname()[0].split("%")[0]


def is_loopback(address: str) -> bool:
    """Tell whether an address leads to this machine itself; "%eth0" may follow an IPv6 address."""
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def choose_interface(master: str, addresses: list[str], nnodes: int) -> Interface | None:
    """Choose the interface that reaches node 0; on node 0, the one that has its address.

    Args:
        master: MASTER_ADDR, as it was given; not read on one node.
        addresses: what it resolves to here; not read on one node.

    Returns:
        None if the interface of this machine's own address is unknown.

    Raises:
        ValueError: no interface leads to another machine.
    """
    if nnodes == 1:
        return _interface_of("127.0.0.1", "all processes are on this node")
    # Usually: the first address with a route that leaves this machine decides.
    for address in addresses:
        own = own_address_towards(address)
        if own is not None and not is_loopback(own):
            shown = master if master == address else f"{master} ({address})"
            return _interface_of(own, f"it reaches MASTER_ADDR {shown}")
    # Otherwise all nodes are on this machine, or this is node 0 and its own name misleads.
    if master in NAMES_OF_THIS_MACHINE or master in addresses:
        return _interface_of("127.0.0.1", f"MASTER_ADDR {master} is this machine itself")
    return _interface_to_others(master, addresses)


def _interface_to_others(master: str, addresses: list[str]) -> Interface | None:
    """Choose the interface of node 0 whose own name /etc/hosts maps to the loopback."""
    loopback = f"MASTER_ADDR {master} is {addresses[0]} here, which no other node reaches"
    # Asking for the route to any other machine gives the default route, if there is one.
    own = own_address_towards(ELSEWHERE)
    if own is not None:
        return _interface_of(own, f"{loopback}: the default route")
    outside: dict[str, str] = {}  # the first address of each interface
    for address, name in _ipv4_addresses().items():
        if not is_loopback(address):
            outside.setdefault(name, address)
    if len(outside) == 1:
        (own,) = outside.values()
        return _interface_of(own, f"{loopback}: the only interface")
    raise ValueError(
        f"MASTER_ADDR = {master}: must be an address that the other nodes reach; here it is "
        f"{addresses[0]}, and which of {', '.join(outside) or 'no interface'} they reach is "
        "unknown. Fix: MASTER_ADDR = node 0's address."
    )


def _interface_of(address: str, reason: str) -> Interface | None:
    """Find the interface that has an address; None if the kernel's tables do not list it."""
    name = local_addresses().get(address)
    return None if name is None else Interface(name, address, reason)


def interface_settings(chosen: Interface | None, given: dict[str, str]) -> dict[str, str]:
    """Make the variables that tell gloo and NCCL the interface, except those already given.

    Raises:
        ValueError: gloo was given an interface that this machine does not have.
    """
    named = given.get("GLOO_SOCKET_IFNAME", "")
    missing = [name for name in named.split(",") if name and name not in local_addresses().values()]
    if missing:
        there = ", ".join(dict.fromkeys(local_addresses().values()))
        raise ValueError(
            f"GLOO_SOCKET_IFNAME = {named}: must be an interface of this machine with an address "
            f"({there}). Fix: one of these, or unset it to have it chosen."
        )
    if chosen is None:
        return {}
    # NCCL takes a name for a prefix (bond0 would also be bond0.100) unless it begins with "=".
    settings = {"GLOO_SOCKET_IFNAME": chosen.name, "NCCL_SOCKET_IFNAME": f"={chosen.name}"}
    return {name: value for name, value in settings.items() if not given.get(name)}


def shown_address(environment: dict[str, str]) -> str:
    """Name the address and the interface that gloo tells the other nodes, for the user."""
    name = environment.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    found = [address for address, interface in local_addresses().items() if interface == name]
    return f"{found[0]} ({name})" if found else "unknown"


def listen(port: int) -> socket.socket:
    """Open a port of this node for the store; 0 lets the kernel choose one.

    Raises:
        ValueError: the port is taken, or may not be opened.
    """
    limit = time.monotonic() + PORT_SECONDS
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port))
        except OSError as error:
            if isinstance(error, PermissionError) or time.monotonic() >= limit:
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise ValueError(
                    f"MASTER_PORT = {port}: must be a port that is free on node 0 ({reason}). Fix: "
                    "another one, the same on all nodes, or end the process that has it."
                ) from None
            time.sleep(0.5)
