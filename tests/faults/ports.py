"""Ports for the launches of a test."""

import socket


def free_port() -> int:
    """Ask the kernel for a port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
