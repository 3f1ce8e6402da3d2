"""launch/store.py: connections to node 0 that end, and what they do to stderr."""

import os
import socket
import threading

import torch.distributed as dist

from launch import store as stores
from launch.store import DEAD_SECONDS, Node0, connect


def is_connected_to(each: socket.socket, port: int) -> bool:
    """Tell whether this end of a connection is the client's, of a server at the port."""
    try:
        return each.getpeername()[1:2] == (port,)
    except OSError:  # It listens, or is connected to nothing.
        return False


def test_the_kernel_ends_a_connection_to_node_0_once_the_network_is_cut():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = connect(Node0("127.0.0.1", "127.0.0.1", server.port))
    assert found is not None
    # All descriptors are read, not those that are new: a number that was closed is given again.
    limits = []
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if not os.path.exists(path) or not os.readlink(path).startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(int(name))) as each:
            if not is_connected_to(each, server.port):
                continue
            limits.append(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
            assert each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < DEAD_SECONDS
    # Ours, and the one that the server keeps to itself.
    assert limits == [1000 * DEAD_SECONDS] * 2
    # A socket that is no connection, and a file, are passed over.
    with socket.create_server(("127.0.0.1", 0)), open(os.devnull):
        stores.end_dead_connections(server.port)


def test_two_threads_that_connect_leave_stderr_where_it_was():
    before = os.readlink("/proc/self/fd/2")
    inside = [threading.Event() for _ in range(2)]
    may_leave = [threading.Event() for _ in range(2)]

    def connect_slowly(number: int) -> None:
        with stores._silence():
            inside[number].set()
            may_leave[number].wait(10)

    threads = [threading.Thread(target=connect_slowly, args=(number,)) for number in range(2)]
    threads[0].start()
    inside[0].wait(10)
    threads[1].start()
    inside[1].wait(0.3)
    for thread, event in zip(threads, may_leave, strict=True):
        event.set()
        thread.join(10)
    assert os.readlink("/proc/self/fd/2") == before


def test_looking_for_connections_leaves_no_descriptor_open():
    read_end, write_end = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull):
        stores.end_dead_connections(29500)
    os.close(read_end)
    os.close(write_end)
    assert len(os.listdir("/proc/self/fd")) == before - 2
