"""A whole server of four ranks that share the GPUs there are, in CUDA graphs, in float32: texts can be compared."""

import asyncio
import json
import subprocess
import sys

import httpx
import pytest
import torch
from openai import AsyncOpenAI
from support.reference import Reference
from support.server import Server, wait_until

from launch.config import REPO
from launch.server import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
    pytest.mark.timeout(300),
]
SETTINGS = ("model=demo", "model.device=cuda", "model.dtype=float32", "exchange.kind=symmetric")


async def texts_of(server: Server, wanted) -> list[str]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answers = [
            client.completions.create(model="demo", prompt=w.prompt, max_tokens=len(w.tokens), temperature=0)
            for w in wanted
        ]
        return [answer.choices[0].text for answer in await asyncio.gather(*answers)]


def test_graphs_give_the_tokens_of_transformers_before_and_after_experts_have_moved():
    reference = Reference()
    wanted = reference.continuations(12)
    eplb = ("eplb.mode=async", "eplb.interval_s=3600", "eplb.half_life_steps=20", "elastic.redundant_slots=1")
    with Server(torchrun(4), *SETTINGS, *eplb, "log_level=warning") as server:
        right = [reference.text(w.tokens) for w in wanted]
        assert asyncio.run(texts_of(server, wanted)) == right
        assert all(member["cuda_graphs"] > 0 for member in server.status()["members"])
        op = httpx.post(f"{server.url}/elastic/rebalance", timeout=10).raise_for_status().json()["id"]

        def ended():
            answer = httpx.get(f"{server.url}/elastic/ops/{op}", timeout=10).json()
            return answer if answer["state"] != "pending" else None

        assert wait_until(ended, 30, "the rebalance ends")["state"] == "moved"
        assert asyncio.run(texts_of(server, wanted)) == right
        server.stop()


def test_killed_ranks_change_no_token():
    """One rank, two at once, and a second in the recovery of the first, with enough replicas that graphs stay."""
    faults = ("chaos.faults=4", "chaos.kinds=calm,kill,kill_two,kill_in_recovery", "chaos.requests=8")
    command = [sys.executable, "launch/chaos.py", *SETTINGS, "elastic.redundant_slots=4", *faults]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=280, check=False)
    print(run.stderr)
    found = json.loads(run.stdout.splitlines()[-1])
    print(found)
    assert found["requests"] == found["finished"] == 32
    assert found["mismatched"] == found["duplicated"] == found["lost"] == 0
    assert found["faults"] == {"planned": 4, "fired": 4, "counted": 4}
    assert found["not_rejoined"] == found["placements_wrong"] == 0
    assert sum(found["bytes_by_source"].values()) == found["bytes_lower_bound"]
    assert run.returncode == 0
