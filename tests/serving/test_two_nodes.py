"""Two torchrun commands, each with a node rank of its own, on one host: one group of four ranks, two front ends."""

import asyncio
import signal
import socket
from contextlib import ExitStack

import pytest
from openai import AsyncOpenAI
from support.reference import Reference
from support.server import STOP_WITHIN_S, Launched, Server, run_to_end

from launch.server import several_nodes

pytestmark = pytest.mark.xdist_group("two nodes")


def test_both_front_ends_serve_one_group(reference: Reference, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ELASTIC_MOE_SECRET", "known to both nodes")
    wanted = reference.continuations(8)

    async def ask(urls: list[str]) -> list[str]:
        clients = [AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) for url in urls]
        answers = await asyncio.gather(
            *(
                clients[i % 2].completions.create(
                    model="demo", prompt=w.prompt, max_tokens=len(w.tokens), temperature=0
                )
                for i, w in enumerate(wanted)
            )
        )
        for client in clients:
            await client.close()
        return [answer.choices[0].text for answer in answers]

    with ExitStack() as stack:
        servers = [stack.enter_context(Server(command, "log_level=warning")) for command in several_nodes(2, 2)]
        texts = asyncio.run(asyncio.wait_for(ask([server.url for server in servers]), 60))
        assert texts == [reference.text(w.tokens) for w in wanted]
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
        assert ended.seconds_after_complaint < 10  # 2 s when the first node is not loading on the same two cores
        other.process.send_signal(signal.SIGINT)
        other.wait(STOP_WITHIN_S)
        other.assert_nothing_left()
