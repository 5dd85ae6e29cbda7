"""Two torchrun commands as two nodes: one is killed with its whole process tree, the other goes on serving."""

import asyncio
from contextlib import ExitStack

import httpx
import pytest
from openai import AsyncOpenAI
from support.reference import Reference
from support.server import Server, wait_until

from launch.server import several_nodes

pytestmark = [pytest.mark.xdist_group("two nodes"), pytest.mark.timeout(170)]

STREAMS = 6


async def stream(url: str, prompt: str, tokens: int, begun: asyncio.Event) -> str:
    text = ""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        async for chunk in await client.completions.create(
            model="demo", prompt=prompt, max_tokens=tokens, temperature=0, stream=True
        ):
            text += chunk.choices[0].text
            begun.set()
    return text


@pytest.mark.parametrize(
    "lost", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["the first node", "the second node"]
)
def test_the_other_node_serves_on(reference: Reference, lost: int):
    """Node 0 has the first rank, the lighthouse in use, torchrun's store and one of the two front ends."""
    wanted = reference.continuations(STREAMS)

    async def work(survivor: Server, victim: Server) -> list[str]:
        begun = asyncio.Event()
        tasks = [asyncio.create_task(stream(survivor.url, w.prompt, len(w.tokens), begun)) for w in wanted]
        await begun.wait()
        for process in victim.processes():
            process.kill()
        assert not any(task.done() for task in tasks), "the node is lost while all streams run"
        return await asyncio.gather(*tasks)

    with ExitStack() as stack:
        servers = [stack.enter_context(Server(command, "log_level=warning")) for command in several_nodes(2, 2)]
        victim, survivor = servers[lost], servers[1 - lost]
        assert victim.url != survivor.url
        texts = asyncio.run(asyncio.wait_for(work(survivor, victim), 90))
        assert texts == [reference.text(w.tokens) for w in wanted]
        assert 0 < resubmitted(survivor) < STREAMS, "the lost node had some of them, not all"
        ranks = [2 * (1 - lost), 2 * (1 - lost) + 1]

        def only_the_survivors_serve() -> bool:
            members = survivor.status()["members"]
            return [m["rank"] for m in members] == ranks and all(m["phase"] == "serving" for m in members)

        wait_until(only_the_survivors_serve, 20, "the other node's ranks serve alone")
        again = asyncio.run(asyncio.wait_for(work_again(survivor, reference), 60))
        assert again == texts
        survivor.stop()


def resubmitted(server: Server) -> int:
    """Requests that were given to another rank."""
    (line,) = (
        line
        for line in httpx.get(f"{server.url}/metrics", timeout=10).text.splitlines()
        if line.startswith("elastic_moe_requests_resubmitted_total ")
    )
    return int(float(line.split()[1]))


async def work_again(survivor: Server, reference: Reference) -> list[str]:
    wanted = reference.continuations(STREAMS)
    return await asyncio.gather(*(stream(survivor.url, w.prompt, len(w.tokens), asyncio.Event()) for w in wanted))
