"""Ranks that cannot serve, and say so: too few slots, a disk with wrong bytes. Service returns by itself."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from support.reference import Continuation, Reference
from support.server import DEMO_MODEL, Server, wait_until

from launch.faults.disk import flip_experts
from launch.server import torchrun

pytestmark = pytest.mark.xdist_group("unavailable")


def health(server: Server) -> tuple[int, dict[str, Any]]:
    answer = httpx.get(f"{server.url}/health", timeout=5)
    return answer.status_code, answer.json()


def complete(server: Server, wanted: Continuation) -> httpx.Response:
    body = {"model": "demo", "prompt": wanted.prompt, "max_tokens": len(wanted.tokens), "temperature": 0}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


async def stream(server: Server, wanted: Continuation, begun: asyncio.Event) -> str:
    text = ""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        async for chunk in await client.completions.create(
            model="demo", prompt=wanted.prompt, max_tokens=len(wanted.tokens), temperature=0, stream=True
        ):
            text += chunk.choices[0].text
            begun.set()
    return text


def lose_rank_and_wait(server: Server, rank: int, reason: str, reference: Reference, mend: Any = None) -> None:
    """Kill an engine under streams: health and new requests get 503 with `reason`; then `mend`, and when all serve
    again the streams have the text of an undisturbed run."""
    wanted = reference.continuations(4)

    async def work() -> list[str]:
        begun = asyncio.Event()
        tasks = [asyncio.create_task(stream(server, w, begun)) for w in wanted]
        await begun.wait()
        server.engines()[rank].kill()
        await asyncio.to_thread(check_refusal)
        if mend is not None:
            mend()
        return await asyncio.gather(*tasks)

    def check_refusal() -> None:
        wait_until(lambda: (found := health(server))[0] == 503 and reason in found[1]["reason"], 20, reason)
        refused = complete(server, wanted[0])
        assert refused.status_code == 503
        assert reason in refused.json()["error"]["message"]

    texts = asyncio.run(asyncio.wait_for(work(), 90))
    assert texts == [reference.text(w.tokens) for w in wanted]
    wait_until(lambda: health(server)[0] == 200 and len(server.status()["members"]) == 2, 60, "all ranks serve again")
    again = complete(server, wanted[0])
    assert again.json()["choices"][0]["text"] == reference.text(wanted[0].tokens)


def test_too_few_slots(reference: Reference):
    with Server(torchrun(2), "elastic.grow_slots=false", "log_level=warning") as server:
        lose_rank_and_wait(server, 1, "8 slots short in every layer", reference)
        server.stop()


@pytest.mark.slow
def test_no_disk_is_right(reference: Reference, tmp_path: Path):
    """The only source of the lost experts has other bytes than at the start: nobody serves them. It is mended, and
    they are read again."""
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "demo")
    with Server(torchrun(2), f"model.path={folder}", "log_level=warning") as server:
        assert server.url
        flip_experts(folder)
        lose_rank_and_wait(server, 1, "another digest than the group's", reference, lambda: flip_experts(folder))
        server.stop()
