"""What one request may do to a server: nothing to anybody else. And what is known of engines that have died."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.reference import Reference
from support.server import Server, wait_until

from launch.config import REPO
from launch.faults.sabotage.sitecustomize import DIES, RAISES
from launch.server import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("poison"), pytest.mark.timeout(170)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Of three ranks; some prompts are poison. Its cache has 31 pages of 32, though 1000 tokens are asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO / "launch" / "faults" / "sabotage"))
        with Server(torchrun(3), "model=demo", "log_level=error", "serving.kv_cache_tokens=1000") as server:
            yield server
            server.stop()


def post(server: Server, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json={"model": "demo", "temperature": 0, **body}, timeout=60)


def wait_until_whole(server: Server) -> dict[str, Any]:
    def whole() -> dict[str, Any] | None:
        status = server.status()
        good = len(status["members"]) == 3 and all(m["phase"] == "serving" for m in status["members"])
        return status if good else None

    return wait_until(whole, 60.0, "all ranks serve")


def test_the_limit_that_is_told_is_the_one_that_holds(server):
    wait_until_whole(server)
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"] == 992
    refused = post(server, prompt=[9] * 985, max_tokens=15)
    assert refused.status_code == 400
    assert "985 prompt tokens and 15 to generate exceed the limit of 992 tokens" in refused.json()["error"]["message"]
    fits = post(server, prompt=[9] * 985, max_tokens=7)
    assert fits.status_code == 200
    assert fits.json()["usage"]["total_tokens"] <= 992


@pytest.mark.parametrize(("poison", "reason", "max_dead"), [
    (RAISES, "the model failed: this prompt is poison", 0),
    (DIES, "3 processes died while they ran this request", 3),
], ids=["raises", "dies"])  # fmt: skip
def test_a_poisonous_request_ends_with_an_error_and_all_others_with_their_tokens(
    server, reference: Reference, poison: list[int], reason: str, max_dead: int
):
    before = {m["incarnation"] for m in wait_until_whole(server)["members"]}
    wanted = reference.continuations(9)

    async def ask(client: httpx.AsyncClient, prompt: Any, max_tokens: int) -> httpx.Response:
        body = {"model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return await client.post("/v1/completions", json=body)

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            innocent = [asyncio.create_task(ask(client, w.prompt, len(w.tokens))) for w in wanted]
            await asyncio.sleep(0.2)
            return await asyncio.gather(ask(client, [*poison, 5], 20), *innocent)

    died, *lived = asyncio.run(all_at_once())
    assert died.status_code == 500
    assert reason in died.json()["error"]["message"]
    assert [answer.json()["choices"][0]["text"] for answer in lived] == [reference.text(w.tokens) for w in wanted]
    after = {m["incarnation"] for m in wait_until_whole(server)["members"]}
    assert len(before - after) == max_dead
    assert server.process.poll() is None


def test_health_tells_at_once_that_all_engines_have_died(server, reference: Reference):
    wait_until_whole(server)
    for engine in server.engines().values():
        engine.kill()
    begin = time.monotonic()
    wait_until(lambda: httpx.get(f"{server.url}/health", timeout=5).status_code == 503, 5.0, "503")
    assert time.monotonic() - begin < 1.0
    wait_until_whole(server)
    (wanted,) = reference.continuations(1)
    answer = post(server, prompt=wanted.prompt, max_tokens=len(wanted.tokens))
    assert answer.json()["choices"][0]["text"] == reference.text(wanted.tokens)
