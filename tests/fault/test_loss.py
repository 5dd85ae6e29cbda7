"""Ranks die while streams run: every stream goes on with the tokens of an undisturbed run, and the rank comes back."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import httpx
import pytest
from openai import AsyncOpenAI
from support.server import Server, wait_until

from elastic_moe.deadlines import Deadlines
from launch.server import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fault-server"), pytest.mark.timeout(170)]

PROMPTS = ("In the beginning God created", "To install a package,", "The str.join() method", "And the LORD said unto")
STREAMS = 6
STOPPED_S = 12.0
"""Streams and the loss of a stopped rank take so long at most: less than `elastic.hang_timeout_s`, 20 s."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(torchrun(4), "model=demo", "log_level=warning") as server:
        yield server
        server.stop()


async def stream(client: AsyncOpenAI, number: int, arrived: asyncio.Event) -> str:
    """One stream; even ones greedy, odd ones sampled with a seed."""
    text, chunks = "", 0
    async for chunk in await client.completions.create(
        model="demo",
        prompt=PROMPTS[number % len(PROMPTS)],
        max_tokens=48,
        temperature=0.8 * (number % 2),
        seed=number,
        stream=True,
    ):
        text += chunk.choices[0].text
        chunks += 1
        if chunks == 8:
            arrived.set()
    return text


def run_streams(server: Server, victims: tuple[int, ...] = (), how: signal.Signals = signal.SIGKILL) -> list[str]:
    """The texts of all streams; `victims` get the signal in the middle of them, all in the same moment."""
    pids = {rank: process.pid for rank, process in server.engines().items()}

    async def work() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            arrived = asyncio.Event()
            tasks = [asyncio.create_task(stream(client, number, arrived)) for number in range(STREAMS)]
            await arrived.wait()
            for rank in victims:
                os.kill(pids[rank], how)
            return await asyncio.gather(*tasks)

    return asyncio.run(work())


def events(server: Server) -> list[dict]:
    reports = [event["report"] for event in httpx.get(f"{server.url}/elastic/events").json()]
    return [report for report in reports if report["type"] == "recovery"]


def wait_until_whole(server: Server) -> None:
    """All four ranks serve again, with one placement that covers every expert."""

    def whole() -> bool:
        members = server.status()["members"]
        hashes = {m["placement_hash"] for m in members}
        return len(members) == 4 and all(m["phase"] == "serving" for m in members) and len(hashes) == 1

    wait_until(whole, 60.0, "four ranks serve")
    members = server.status()["members"]
    for layer in range(len(members[0]["slots"])):
        held = {expert for m in members for expert in m["slots"][layer] if expert >= 0}
        assert held == set(range(members[0]["num_experts"])), f"layer {layer}"


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[str]:
    return run_streams(server)


@pytest.mark.parametrize("victims", [(0,), (1, 3)])
def test_killed_ranks_harm_no_stream(server, undisturbed, victims):
    wait_until_whole(server)
    begin = time.time()
    assert run_streams(server, victims) == undisturbed
    lost = {rank for report in events(server) if report["noticed_at"] >= begin for rank in report["lost"]}
    assert lost == set(victims), "the fault did not fire"
    text = httpx.get(f"{server.url}/metrics").text
    for metric in ("faults_total", 'recovery_seconds_count{phase="view"}', "transfer_bytes_total", "epoch"):
        assert f"elastic_moe_{metric}" in text
    wait_until_whole(server)
    assert run_streams(server) == undisturbed


def test_a_stopped_rank_is_killed_and_replaced(server, undisturbed):
    wait_until_whole(server)
    pid = server.engines()[3].pid
    begin = time.monotonic()
    assert run_streams(server, (3,), signal.SIGSTOP) == undisturbed
    assert time.monotonic() - begin < STOPPED_S
    wait_until_whole(server)
    assert server.engines()[3].pid != pid


def test_a_slow_rank_is_kept(server, undisturbed):
    """Stopped for less than the timeout: nothing is lost, nobody is replaced."""
    wait_until_whole(server)
    pids = {rank: process.pid for rank, process in server.engines().items()}
    epoch = server.status()["epoch"]
    os.kill(pids[1], signal.SIGSTOP)
    timer = asyncio.run(_resume_later(server, pids[1]))
    assert timer == undisturbed
    assert server.status()["epoch"] == epoch
    assert {rank: process.pid for rank, process in server.engines().items()} == pids


async def _resume_later(server: Server, pid: int) -> list[str]:
    streams = asyncio.create_task(asyncio.to_thread(run_streams, server))
    await asyncio.sleep(Deadlines().progress_s / 2)
    os.kill(pid, signal.SIGCONT)
    return await streams


def test_the_front_end_is_replaced_behind_its_port(server, undisturbed):
    wait_until_whole(server)
    front_end = next(p for p in server.processes() if "elastic_moe.serving.front_end.process" in p.cmdline())
    front_end.kill()
    wait_until(lambda: _healthy(server), 60.0, "a new front end answers")
    assert run_streams(server) == undisturbed


def _healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
