"""Experts move while a real server streams: on request only, so that the tests say when."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from support.ranks import run_ranks
from support.reference import NEAR_TIE, Continuation, Reference
from support.server import Server, wait_until

from elastic_moe.config import EplbConfig
from elastic_moe.placement.balancedness import balancedness
from elastic_moe.placement.placement import initial_placement
from elastic_moe.placement.topology import Topology
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.runtime.initial_placement import read_loads
from launch.server import torchrun

pytestmark = pytest.mark.xdist_group("server")

LAYERS, EXPERTS, RANKS = 5, 16, 4
SCRIPTURE = ("In the beginning God created", "And the LORD said unto Moses,", "Then Pharaoh called for")
MANUALS = ("The str.join() method", "Raises a ValueError if", "The kernel modules are", "System logs are kept in")
LENGTH = 64
OP_WITHIN_S = 30.0


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Four ranks that balance in the background when they are asked to: never by themselves in this time."""
    failed_before = request.session.testsfailed
    settings = ("eplb.mode=async", "eplb.interval_s=3600", "eplb.half_life_steps=20", "elastic.redundant_slots=1")
    with Server(torchrun(RANKS), "model=demo", "log_level=warning", *settings) as server:
        yield server
        if request.session.testsfailed > failed_before:
            print(server.log())
        server.stop()


def get(server: Server, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", timeout=10)


def rebalance(server: Server) -> str:
    answer = httpx.post(f"{server.url}/elastic/rebalance", timeout=10)
    assert answer.status_code == 202
    assert answer.json()["state"] == "pending"
    return answer.json()["id"]


def ended(server: Server, name: str) -> dict:
    """The operation once it is not pending any more."""

    def look():
        op = get(server, f"/elastic/ops/{name}").raise_for_status().json()
        return op if op["state"] != "pending" else None

    return wait_until(look, OP_WITHIN_S, f"operation {name} ends")


def chosen(reference: Reference, prompts) -> list[Continuation]:
    wanted = [reference.greedy(prompt, LENGTH) for prompt in prompts]
    assert min(w.margin for w in wanted) > NEAR_TIE, "another batch may decide a near tie otherwise"
    return wanted


async def stream_all(server: Server, wanted, in_the_middle=None) -> tuple[list[str], Any, int]:
    """Stream all at once; `in_the_middle()` runs in a thread when every stream has begun and none has ended."""
    begun = [asyncio.Event() for _ in wanted]
    running = len(wanted)

    async def one(client, continuation, first) -> str:
        nonlocal running
        chunks = await client.completions.create(
            model="demo", prompt=continuation.prompt, max_tokens=len(continuation.tokens), temperature=0, stream=True
        )
        text = ""
        async for chunk in chunks:
            text += chunk.choices[0].text
            first.set()
        running -= 1
        return text

    async def interrupt():
        for event in begun:
            await event.wait()
        found = await asyncio.to_thread(in_the_middle) if in_the_middle else None
        return found, running

    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client, asyncio.timeout(90):
        streams = [one(client, w, first) for w, first in zip(wanted, begun, strict=True)]
        middle = asyncio.create_task(interrupt())
        texts = await asyncio.gather(*streams)
        found, still_running = await middle
    return texts, found, still_running


def test_an_idle_group_wakes_up_to_rebalance(server: Server, reference: Reference):
    wanted = chosen(reference, SCRIPTURE)
    texts, _, _ = asyncio.run(stream_all(server, wanted))
    assert texts == [reference.text(w.tokens) for w in wanted]
    server.wait_until_idle()
    before = server.status()["placement"]["version"]
    op = ended(server, rebalance(server))
    assert op["state"] == "moved", op
    assert op["report"]["max_mean_after"] < op["report"]["max_mean_before"]
    assert op["report"]["version"] > before
    wait_until(
        lambda: {m["placement_version"] for m in server.status()["members"]} == {op["report"]["version"]},
        10,
        "every rank tells the new placement",
    )


def test_streams_go_on_while_experts_move(server: Server, reference: Reference):
    wanted = chosen(reference, MANUALS)

    def work():
        return ended(server, rebalance(server))

    texts, op, still_running = asyncio.run(stream_all(server, wanted, work))
    assert op["state"] == "moved", op
    assert still_running > 0, "the experts moved after the streams"
    assert texts == [reference.text(w.tokens) for w in wanted]
    sources = op["report"]["bytes_by_source"]
    assert sum(sources.values()) - sources.get("own", 0) == op["report"]["bytes_lower_bound"] > 0


def test_each_round_is_told_once(server: Server, reference: Reference):
    before = len(get(server, "/elastic/events").json())
    for prompts in (MANUALS, SCRIPTURE):
        asyncio.run(stream_all(server, chosen(reference, prompts)))
        assert ended(server, rebalance(server))["state"] == "moved"
    reports = [event["report"] for event in get(server, "/elastic/events").json()][before:]
    assert [(r["type"], r["outcome"], len(r["ops"])) for r in reports] == [("rebalance", "moved", 1)] * 2
    assert len({(r["epoch"], r["number"]) for r in reports}) == 2
    assert 0 < reports[0]["ended_at"] < reports[1]["ended_at"]
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(get(server, "/metrics").text)
        for sample in family.samples
    }
    assert samples["elastic_moe_rebalances_total", "moved"] == before + 2
    told = [samples["elastic_moe_balancedness", str(layer)] for layer in range(LAYERS)]
    assert told == reports[1]["balancedness"]
    assert 0 < min(told) < 1


def test_an_unknown_operation_is_not_found(server: Server):
    answer = get(server, "/elastic/ops/nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "no operation 'nobody' here; POST /elastic/rebalance names one"


def place(launch, loads):
    eplb = EplbConfig(initial_loads=loads)
    runtime = ElasticRuntime.join(launch, device=torch.device("cpu"), eplb=eplb)
    slots = runtime.place(LAYERS, EXPERTS, redundant_slots=1).slots
    runtime.groups.control.barrier()
    runtime.close()
    return slots


def test_the_loads_of_all_ranks_place_the_experts_of_another_start(server: Server, tmp_path: Path):
    answer = get(server, "/elastic/loads")
    dump = answer.json()
    assert (dump["ranks"], dump["missing_ranks"]) == (list(range(RANKS)), [])
    of_layer = np.array(dump["logical_count"]).sum(axis=1)
    assert of_layer.min() > 0
    assert np.ptp(of_layer) <= RANKS * EXPERTS, "each layer has seen the same tokens, but for rounding"
    file = tmp_path / "loads.json"
    file.write_text(json.dumps(dump))
    loads = read_loads(file, LAYERS, EXPERTS)
    first, *others = run_ranks(place, RANKS, str(file))
    assert all(np.array_equal(first, other) for other in others)
    default = initial_placement(LAYERS, EXPERTS, Topology.uniform(RANKS), 5, replicate=True).slots
    assert all(set(layer) >= set(range(EXPERTS)) for layer in first.tolist())
    assert balancedness(first, loads, 5).mean() > balancedness(default, loads, 5).mean()
