"""Two torchrun commands, each with a node rank of its own, on one host: one group of four ranks, two front ends."""

import asyncio
import shutil
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from support.reference import Continuation, Reference
from support.server import DEMO_MODEL, STOP_WITHIN_S, Launched, Server, run_to_end, wait_until

from launch.faults.disk import flip_experts
from launch.server import several_nodes

pytestmark = pytest.mark.xdist_group("two nodes")


def _texts(urls: list[str], wanted: list[Continuation]) -> list[str]:
    """What the front ends, asked in turn, make of the prompts."""

    async def ask() -> list[str]:
        clients = [AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) for url in urls]
        answers = await asyncio.gather(
            *(
                clients[i % len(clients)].completions.create(
                    model="demo", prompt=w.prompt, max_tokens=len(w.tokens), temperature=0
                )
                for i, w in enumerate(wanted)
            )
        )
        for client in clients:
            await client.close()
        return [answer.choices[0].text for answer in answers]

    return asyncio.run(asyncio.wait_for(ask(), 60))


def test_both_front_ends_serve_one_group(reference: Reference, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ELASTIC_MOE_SECRET", "known to both nodes")
    wanted = reference.continuations(8)
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(command, "log_level=warning")) for command in several_nodes(2, 2)]
        urls = [server.url for server in servers]
        assert _texts(urls, wanted) == [reference.text(w.tokens) for w in wanted]
        for node, server in enumerate(servers):
            status = server.status()
            assert status["node"] == node
            assert [(m["rank"], m["node"], m["phase"]) for m in status["members"]] == [
                (0, 0, "serving"), (1, 0, "serving"), (2, 1, "serving"), (3, 1, "serving"),
            ]  # fmt: skip
            pids = {m["pid"] for m in status["members"] if m["node"] == node}
            assert pids <= {p.pid for p in server.processes()}
        for server in servers:
            server.process.send_signal(signal.SIGTERM)
        for server in servers:
            server.wait(STOP_WITHIN_S)
            server.assert_nothing_left()


def test_a_taken_port_on_the_second_node():
    first, second = several_nodes(2, 2)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        Launched(first, "server.port=0", "log_level=warning") as other,
    ):
        port = taken.getsockname()[1]
        ended = run_to_end(second, f"server.port={port}", "log_level=warning")
        reason = f"server.port={port} is taken on 127.0.0.1; choose another with server.port=PORT (0: any free one)"
        assert ended.complaints == [f"elastic_moe: {reason}"]
        assert "exitcode  : 2" in ended.err  # torchrun's own report on the supervisor
        assert (
            ended.seconds_after_complaint < 20
        )  # 2 s when the first node is not loading on the same two cores; 12 seen
        other.process.send_signal(signal.SIGINT)
        other.wait(STOP_WITHIN_S)
        other.assert_nothing_left()


@pytest.mark.slow
def test_bits_flipped_on_one_node_before_the_start(reference: Reference, tmp_path: Path):
    wanted = reference.continuations(8)
    disk = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, disk)
    assert flip_experts(disk)
    first, second = several_nodes(2, 2)
    own = ["elastic.redundant_slots=1", "model.name=demo", "log_level=warning"]
    with Server(first, *own) as good, Server(second, f"model.path={disk}", *own) as bad:
        assert _texts([good.url, bad.url], wanted) == [reference.text(w.tokens) for w in wanted]
        assert "wrong in the checkpoint of node 1 (127.0.0.1): layer 0 expert 0" in good.err
        assert "of node 0" not in good.err


@pytest.mark.slow
def test_launch_lines_that_differ():
    first, second = several_nodes(2, 2)
    with Launched(first, "server.port=0") as one, Launched(second, "server.port=0", "elastic.redundant_slots=1") as two:
        for launched in (one, two):
            launched.wait(60)
            wait_until(lambda node=launched: not node.processes(), 10, "no process is left")
            assert "exitcode  : 2" in launched.err
            complaints = set(launched.complaints())
            assert len(complaints) == 1, complaints
            assert "redundant_slots" in complaints.pop()
