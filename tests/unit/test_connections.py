"""Connections of a group, found among all of a process's and shut."""

import socket
from contextlib import ExitStack

from elastic_moe.group.connections import Connections, listening_ports


def test_connections_to_and_from_listeners_are_shut_and_no_others():
    with ExitStack() as stack:
        group, other = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        assert {group.getsockname()[1], other.getsockname()[1]} <= set(listening_ports())

        def connect(server: socket.socket) -> tuple[socket.socket, socket.socket]:
            ours = stack.enter_context(socket.create_connection(server.getsockname()))
            return ours, stack.enter_context(server.accept()[0])

        inside, outside = connect(group), connect(other)
        connections = Connections({group.getsockname()[:2]})
        assert len(connections._sockets) == 2, connections._sockets
        for _ in range(2):
            connections.shut()
        for sock in inside:
            sock.settimeout(5)
            assert sock.recv(1) == b""
        outside[0].sendall(b"x")
        assert outside[1].recv(1) == b"x"
        connect(group)


def test_a_held_connection_does_not_outlive_its_group():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs = server.accept()[0]
        connections = Connections({server.getsockname()[:2]})
        ours.close()
        theirs.close()
        connections.shut()
        assert connections._sockets == []
