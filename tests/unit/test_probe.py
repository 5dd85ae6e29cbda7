"""Which addresses nobody answers at."""

import socket
import time

from elastic_moe.group.probe import refused, unreachable


def test_who_listens_and_who_refuses_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as other:
            closed = other.getsockname()[1]
        both = [f"tcp://127.0.0.1:{port}", f"127.0.0.1:{closed}"]
        assert unreachable(both) == set()
        assert refused(both) == set(both[1:])


def test_who_does_not_answer_cannot_and_all_are_asked_at_once():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        held = []
        for _ in range(8):  # more than it takes: the kernel answers no further ones
            held.append(socket.socket())
            held[-1].setblocking(False)
            held[-1].connect_ex(("127.0.0.1", port))
        time.sleep(0.05)
        begin = time.monotonic()
        assert unreachable([f"tcp://127.0.0.1:{port}"], 0.3) == {f"tcp://127.0.0.1:{port}"}
        assert 0.25 < time.monotonic() - begin < 0.6
        for sock in held:
            sock.close()


def test_nobody_is_asked_of_nothing():
    assert unreachable([]) == set()
