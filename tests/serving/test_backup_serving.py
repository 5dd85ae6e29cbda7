"""Backups while a server serves: lost experts come from memory, of this node or another, though a daemon dies."""

import signal
from collections import Counter
from contextlib import ExitStack

import httpx
import pytest
from support.reference import Reference
from support.server import Server, wait_until
from test_fork import check, is_another

from launch.faults.kinds import backup_daemons
from launch.server import several_nodes, torchrun

pytestmark = pytest.mark.xdist_group("backup")
ALL_EXPERTS = 80


def wait_until_backed_up(*servers: Server) -> None:
    """Whatever each node keeps is there."""
    for server in servers:
        wait_until(lambda server=server: "are backed up" in server.err, 30, "the share is kept")


def sources_of_recoveries(server: Server) -> Counter[str]:
    """Bytes by source, of every epoch once."""
    events = httpx.get(f"{server.url}/elastic/events", timeout=10).json()
    reports = {event["report"]["epoch"]: event["report"] for event in events if "bytes_by_source" in event["report"]}
    return sum((Counter(report["bytes_by_source"]) for report in reports.values()), Counter())


def lose(server: Server, *ranks: int) -> None:
    """Kill engines, and wait until they are back."""
    before = server.engines()
    for rank in ranks:
        before[rank].kill()
    for rank in ranks:
        pid = before[rank].pid
        wait_until(lambda rank=rank, pid=pid: is_another(server.status()["members"], rank, pid), 40, f"rank {rank}")


def test_lost_experts_come_from_memory_though_the_daemon_has_died(reference: Reference):
    with Server(torchrun(4), "model=demo", "backup.mode=on", "log_level=info") as server:
        check([server.url], reference)
        wait_until_backed_up(server)
        (daemon,) = backup_daemons(server.engines().values())
        daemon.send_signal(signal.SIGSTOP)
        lose(server, 2)
        check([server.url], reference)
        daemon.kill()
        lose(server, 0, 3)
        check([server.url], reference)
        found = sources_of_recoveries(server)
        assert set(found) == {"dram"}
        assert found["dram"] > 0
        wait_until(lambda: "of an earlier life are there, 0 were wrong" in server.err, 10, "the daemon is back")
        assert len(backup_daemons(server.engines().values())) == 1
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["zmq", "mooncake"])
def test_the_share_of_another_node_comes_from_its_memory(
    transport: str, reference: Reference, monkeypatch: pytest.MonkeyPatch
):
    if transport == "mooncake":
        pytest.importorskip("mooncake.engine", exc_type=ImportError, reason="elastic_moe[mooncake] is not installed")
    monkeypatch.setenv("ELASTIC_MOE_SECRET", "known to both nodes")
    options = ("backup.mode=on", f"backup.transport={transport}", "log_level=info", "elastic.sources=dram,remote_dram")
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(command, *options)) for command in several_nodes(2, 2)]
        check([server.url for server in servers], reference)
        wait_until_backed_up(*servers)
        lose(servers[1], 0, 1)
        check([server.url for server in servers], reference)
        found = sources_of_recoveries(servers[1])
        assert set(found) == {"dram", "remote_dram"}
        for server in servers:
            server.process.send_signal(signal.SIGTERM)
        for server in servers:
            server.wait(20)


@pytest.mark.slow
def test_a_node_is_lost_with_its_daemon(reference: Reference, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ELASTIC_MOE_SECRET", "known to both nodes")
    options = ("backup.mode=on", "backup.copies=2", "log_level=info", "elastic.sources=dram,remote_dram")
    with ExitStack() as stack:
        victim, survivor = (stack.enter_context(Server(command, *options)) for command in several_nodes(2, 2))
        check([victim.url, survivor.url], reference)
        wait_until_backed_up(victim, survivor)
        for process in victim.processes():
            process.kill()
        check([survivor.url], reference)
        assert set(sources_of_recoveries(survivor)) == {"dram"}
        survivor.stop()
