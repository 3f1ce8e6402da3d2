"""launch/network.py: which interface gloo and NCCL are told, from this machine's addresses."""

import socket
import threading

import pytest

from launch import network
from launch.network import (
    Interface,
    choose_interface,
    interface_settings,
    local_addresses,
    own_address_towards,
    resolve,
)
from tools.faults.launched_run import free_port

MACHINE = {
    "127.0.0.1": "lo",
    "::1": "lo",
    "10.0.0.5": "eth0",
    "10.1.0.5": "bond0.100",
    "fd00::5": "ib0",
}
ROUTES = {
    "10.0.0.": "10.0.0.5",
    "10.1.0.": "10.1.0.5",
    "fd00::": "fd00::5",
    "127.": "127.0.0.1",
    "::1": "::1",
}
DEFAULT = {network.ELSEWHERE: "10.0.0.5"}


@pytest.fixture
def machine(monkeypatch):
    """A machine with three interfaces beside the loopback, and no default route."""

    def route(address: str) -> str | None:
        return next((own for start, own in ROUTES.items() if address.startswith(start)), None)

    def only_ipv4() -> dict[str, str]:
        return {address: name for address, name in MACHINE.items() if ":" not in address}

    monkeypatch.setattr(network, "local_addresses", lambda: MACHINE)
    monkeypatch.setattr(network, "_ipv4_addresses", only_ipv4)
    monkeypatch.setattr(network, "own_address_towards", route)
    return monkeypatch


def test_the_addresses_of_this_machine_are_found_with_their_interfaces():
    found = local_addresses()
    assert found["127.0.0.1"] == "lo"
    assert set(found.values()) <= {name for _, name in socket.if_nameindex()}


def test_a_route_is_found_without_sending_anything():
    assert own_address_towards("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize(
    "master, addresses, name",
    [
        ("10.0.0.1", ["10.0.0.1"], "eth0"),
        ("10.1.0.1", ["10.1.0.1"], "bond0.100"),
        ("fd00::1", ["fd00::1"], "ib0"),
        ("node0", ["127.0.1.1", "10.1.0.5"], "bond0.100"),  # node 0, whose name has both
        ("node0", ["203.0.113.1", "10.0.0.1"], "eth0"),  # no route to the first
    ],
)
def test_the_interface_is_the_one_that_reaches_node_0(machine, master, addresses, name):
    chosen = choose_interface(master, addresses, nnodes=2)
    assert chosen.name == name
    assert f"it reaches MASTER_ADDR {master}" in chosen.reason


@pytest.mark.parametrize(
    "master, addresses",
    [
        ("localhost", ["::1", "127.0.0.1"]),
        ("127.0.0.1", ["127.0.0.1"]),
    ],
)
def test_nodes_on_one_machine_use_the_loopback(machine, master, addresses):
    assert choose_interface(master, addresses, nnodes=2).name == "lo"


def test_one_node_uses_the_loopback(machine):
    assert choose_interface("", [], nnodes=1).name == "lo"


def test_a_name_that_is_the_loopback_takes_the_default_route(machine):
    machine.setattr(
        network, "own_address_towards", lambda address: DEFAULT.get(address, "127.0.0.1")
    )
    chosen = choose_interface("node0", ["127.0.1.1"], nnodes=2)
    assert chosen.name == "eth0"
    assert chosen.reason == (
        "MASTER_ADDR node0 is 127.0.1.1 here, which no other node reaches: the default route"
    )


def test_a_name_that_is_the_loopback_takes_the_only_interface(machine):
    machine.setattr(network, "_ipv4_addresses", lambda: {"127.0.0.1": "lo", "10.0.0.5": "eth0"})
    assert choose_interface("node0", ["127.0.1.1"], nnodes=2).name == "eth0"


def test_a_name_that_is_the_loopback_is_refused_where_several_could_be_meant(machine):
    with pytest.raises(ValueError) as caught:
        choose_interface("node0", ["127.0.1.1"], nnodes=2)
    assert "MASTER_ADDR = node0: must be an address that the other nodes reach" in str(caught.value)
    assert "127.0.1.1, and which of eth0, bond0.100 they reach is unknown" in str(caught.value)


def test_nccl_gets_the_name_alone_and_not_as_a_prefix():
    chosen = Interface("lo", "127.0.0.1", "")
    expected = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert interface_settings(chosen, {}) == expected


def test_what_the_user_gave_stays():
    chosen = Interface("lo", "127.0.0.1", "")
    given = {"NCCL_SOCKET_IFNAME": "^docker"}
    assert interface_settings(chosen, given) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert interface_settings(chosen, {"GLOO_SOCKET_IFNAME": "lo"}) == {"NCCL_SOCKET_IFNAME": "=lo"}


def test_an_interface_that_is_not_there_is_refused():
    with pytest.raises(ValueError) as caught:
        interface_settings(None, {"GLOO_SOCKET_IFNAME": "lo,ib9"})
    assert "GLOO_SOCKET_IFNAME = lo,ib9: must be an interface of this machine" in str(caught.value)


def test_an_address_that_no_interface_has_is_left_to_gloo(machine):
    machine.setattr(network, "own_address_towards", lambda address: "10.9.9.9")
    assert choose_interface("10.0.0.1", ["10.0.0.1"], nnodes=2) is None
    assert interface_settings(None, {}) == {}


def test_a_name_server_that_does_not_answer_is_asked_again(monkeypatch):
    answers = [socket.gaierror(socket.EAI_AGAIN, "later"), [(2, 1, 6, "", ("10.0.0.1", 0))]]

    def look_up(*_, **__):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(network.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert resolve("node0") == ["10.0.0.1"]


@pytest.mark.parametrize("name", ["", "a" * 70 + ".b", "no.such.host.invalid"])
def test_a_name_without_an_address_is_refused(name):
    with pytest.raises(ValueError, match="MASTER_ADDR = .*must be a name or an address"):
        resolve(name, wait=0.0)


def test_a_port_in_use_is_refused(monkeypatch):
    monkeypatch.setattr(network, "PORT_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"MASTER_PORT = {port}: .*Address already in use"):
            network.listen(port)


def test_a_port_that_becomes_free_is_waited_for():
    port = free_port()
    server = socket.create_server(("127.0.0.1", port))
    threading.Timer(0.2, server.close).start()
    with network.listen(port) as listening:
        assert listening.getsockname()[1] == port
