"""Ports that no outgoing connection is given."""

import socket
from pathlib import Path

import pytest

from elastic_moe.membership.signals import Signals
from elastic_moe.supervision import ports
from elastic_moe.supervision.ports import lasting_port


def test_a_lasting_port_is_free_and_none_that_the_kernel_deals():
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for port in [lasting_port("127.0.0.1") for _ in range(50)]:
        assert not low <= port <= high
        assert port >= ports.FIRST
        socket.create_server(("127.0.0.1", port)).close()


def test_taken_ports_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with socket.create_server(("127.0.0.1", lasting_port("127.0.0.1"))) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "FIRST", port)
        (tmp_path / "range").write_text(f"{port + 1}\t{2**16 - 1}\n")
        monkeypatch.setattr(ports, "_EPHEMERAL", tmp_path / "range")
        assert lasting_port("127.0.0.1") != port


def test_a_seat_whose_port_is_taken_says_so(caplog: pytest.LogCaptureFixture):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        signals = Signals("127.0.0.1", port)
        assert f"port {port} is taken" in caplog.text
        assert signals.address != f"tcp://127.0.0.1:{port}"
        signals._router.close()
