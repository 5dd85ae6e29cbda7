"""R-Fork: a server that takes its weights from another that runs, whatever ranks, faults and moves there are."""

import asyncio
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from support.reference import Reference
from support.server import DEMO_MODEL, STOP_WITHIN_S, Server, run_to_end, wait_until

from launch.server import torchrun

pytestmark = pytest.mark.xdist_group("fork")


@pytest.fixture
def diskless(tmp_path: Path) -> str:
    """The demo model without its weights."""
    for file in DEMO_MODEL.glob("*.json"):
        shutil.copy(file, tmp_path)
    (tmp_path / "elastic_moe_digests.json").unlink()
    return f"model.path={tmp_path}"


@pytest.fixture(scope="module")
def seed() -> Iterator[Server]:
    """It balances."""
    with Server(torchrun(4), "model=demo", "eplb.mode=async", "elastic.redundant_slots=1", "log_level=info") as server:
        yield server
        server.stop()


def texts(urls: Sequence[str], reference: Reference, count: int = 4) -> tuple[list[str], list[str]]:
    """What the servers make of the prompts, in turn, and what is right."""
    wanted = reference.continuations(count)

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

    return asyncio.run(asyncio.wait_for(ask(), 60)), [reference.text(w.tokens) for w in wanted]


def check(urls: Sequence[str], reference: Reference) -> None:
    found, right = texts(urls, reference)
    assert found == right


def is_another(members: Sequence[dict[str, Any]], rank: int, pid: int) -> bool:
    """Whether all serve, and `rank` is not the process that it was."""
    return all(m["phase"] == "serving" for m in members) and any(m["rank"] == rank and m["pid"] != pid for m in members)


def test_three_ranks_without_a_disk_fork_from_four_that_have_rebalanced(
    seed: Server, reference: Reference, diskless: str
):
    check([seed.url], reference)
    httpx.post(f"{seed.url}/elastic/rebalance").raise_for_status()
    wait_until(lambda: seed.status()["placement"]["version"] > 0, 30, "experts have moved")
    with Server(torchrun(3), diskless, f"model.load_from={seed.url}", "log_level=info") as fork:
        check([fork.url, seed.url], reference)
        assert "from instance" in fork.log()
        fork.stop()


@pytest.mark.slow
def test_a_fork_without_a_disk_is_forked_and_loses_a_rank(seed: Server, reference: Reference, diskless: str):
    with Server(torchrun(3), diskless, f"model.load_from={seed.url}", "log_level=info") as fork:
        with Server(torchrun(2), diskless, f"model.load_from=http://127.0.0.1:9,{fork.url}", "log_level=info") as again:
            check([again.url], reference)
            assert "http://127.0.0.1:9 tells of no weights" in again.log()
            again.stop()
        before = fork.engines()[1]
        before.kill()
        wait_until(lambda: is_another(fork.status()["members"], 1, before.pid), 30, "rank 1 is back")
        check([fork.url], reference)
        fork.stop()


@pytest.mark.slow
def test_a_seeds_rank_is_lost_while_it_is_read(reference: Reference, diskless: str):
    """And comes back meanwhile, or later: the other ranks have what it had, then or soon."""
    with Server(torchrun(4), "model=demo", "log_level=warning") as seed:
        url = seed.url
        victim = seed.engines()[2]
        victim.send_signal(signal.SIGSTOP)
        with Server(torchrun(2), diskless, f"model.load_from={url}", "log_level=info") as fork:
            check([fork.url, url], reference)
            fork.stop()
        seed.stop()


@pytest.mark.slow
def test_where_no_server_is_the_disk_serves(reference: Reference):
    with Server(torchrun(2), "model=demo", "model.load_from=http://127.0.0.1:9", "log_level=info") as server:
        check([server.url], reference)
        assert "http://127.0.0.1:9 tells of no weights" in server.log()
        server.stop()


@pytest.mark.slow
def test_mistakes_are_told_in_one_line(seed: Server, diskless: str):
    folder = diskless.removeprefix("model.path=")
    nobody, other = "model.load_from=http://127.0.0.1:9", f"model.load_from={seed.url}"
    form = f"{other}: its weights have another form: give the same model and model.dtype"
    cases = [
        ([nobody], f"{nobody}: no server there gives weights, and {folder} holds none"),
        ([other, "model.dtype=float16"], form),
    ]
    for overrides, reason in cases:
        ended = run_to_end(torchrun(1), diskless, *overrides, "server.port=0", "log_level=warning")
        assert ended.complaints == [f"elastic_moe: {reason}"], ended.err
        assert ended.seconds_after_complaint < STOP_WITHIN_S
