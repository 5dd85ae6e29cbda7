"""Four ranks, the demo model, and clients at the real HTTP port."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import httpx
import psutil
import pytest
import zmq
from openai import APIStatusError, AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from support.reference import Continuation, Reference
from support.server import Server, num_requests, wait_until

from elastic_moe.membership.signals import PeerDied, encode
from elastic_moe.serving.protocol import AskLoads
from elastic_moe.serving.protocol import encode as encode_serving
from elastic_moe.weights.holding import GiveExpert
from elastic_moe.weights.holding import encode as encode_request

pytestmark = pytest.mark.xdist_group("server")

LONG = 900
"""Tokens of a request that takes many seconds."""


def with_client(server: Server, work: Callable[[AsyncOpenAI], Awaitable], within_s: float = 90.0):
    """Run `work` with an openai client of the server."""

    async def run():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.wait_for(work(client), within_s)

    return asyncio.run(run())


async def complete(client: AsyncOpenAI, prompt: str | list[int], stream: bool, **settings):
    """(text, finish reason, usage) of a completion, however it is asked for."""
    if not stream:
        answer = await client.completions.create(model="demo", prompt=prompt, **settings)
        return answer.choices[0].text, answer.choices[0].finish_reason, answer.usage
    chunks = await client.completions.create(
        model="demo", prompt=prompt, stream=True, stream_options={"include_usage": True}, **settings
    )
    text, finish, usage = "", None, None
    async for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.text
            finish = choice.finish_reason or finish
    return text, finish, usage


async def complete_greedily(client: AsyncOpenAI, wanted: Continuation, stream: bool):
    return await complete(client, wanted.prompt, stream, max_tokens=len(wanted.tokens), temperature=0)


def assert_equal(got, wanted: Continuation, reference: Reference) -> None:
    text, finish, usage = got
    assert text == reference.text(wanted.tokens)
    ended = wanted.tokens[-1] == reference.tokenizer.eos_token_id
    assert finish == ("stop" if ended else "length")
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    num_prompt, num_tokens = len(wanted.prompt_tokens), len(wanted.tokens)
    assert counts == (num_prompt, num_tokens, num_prompt + num_tokens)


def test_concurrent_greedy_requests_equal_transformers(server: Server, reference: Reference):
    wanted = reference.continuations(32)
    before = {m["rank"]: m["tokens_generated"] for m in server.status()["members"]}

    async def all_at_once(client: AsyncOpenAI):
        return await asyncio.gather(*(complete_greedily(client, w, i % 2 == 0) for i, w in enumerate(wanted)))

    for got, continuation in zip(with_client(server, all_at_once), wanted, strict=True):
        assert_equal(got, continuation, reference)
    server.wait_until_idle()
    made = {m["rank"]: m["tokens_generated"] - before[m["rank"]] for m in server.status()["members"]}
    assert sum(made.values()) == sum(len(w.tokens) for w in wanted)
    assert all(made.values()), f"a rank had no request: {made}"


def test_token_ids_are_a_prompt_too(server: Server, reference: Reference):
    wanted = reference.continuations(1)[0]

    async def ask(client: AsyncOpenAI):
        settings = {"max_tokens": len(wanted.tokens), "temperature": 0}
        return await complete(client, wanted.prompt_tokens, stream=False, **settings)

    assert_equal(with_client(server, ask), wanted, reference)


def test_a_seed_makes_sampling_repeatable(server: Server):
    async def ask(client: AsyncOpenAI):
        settings = {"max_tokens": 32, "temperature": 0.9, "top_p": 0.95}
        seeds = [7, 7, 8, 7]
        return await asyncio.gather(
            *(complete(client, "The file", i % 2 == 0, seed=seed, **settings) for i, seed in enumerate(seeds))
        )

    first, second, other, third = (text for text, _, _ in with_client(server, ask))
    assert first == second == third != other
    again = [text for text, _, _ in with_client(server, ask)]
    assert again == [first, second, other, third]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(server: Server, reference: Reference, stream: bool):
    wanted = max(reference.continuations(8), key=lambda w: len(w.tokens))
    text = reference.text(wanted.tokens)
    stop = text[len(text) // 2 :][:5]

    async def ask(client: AsyncOpenAI):
        settings = {"max_tokens": len(wanted.tokens), "temperature": 0, "stop": ["never in a text", stop]}
        return await complete(client, wanted.prompt, stream, **settings)

    got, finish, usage = with_client(server, ask)
    assert (got, finish) == (text[: text.index(stop)], "stop")
    assert usage.completion_tokens <= len(wanted.tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_chat(server: Server, reference: Reference, stream: bool):
    contents = ["Explain the following.", "The file object"]
    wanted = reference.greedy("\n".join(contents), 24)  # the demo's chat template joins the messages so

    async def ask(client: AsyncOpenAI):
        messages = [{"role": role, "content": c} for role, c in zip(("system", "user"), contents, strict=True)]
        answer = await client.chat.completions.create(
            model="demo", messages=messages, max_tokens=24, temperature=0, stream=stream
        )
        if not stream:
            return answer.choices[0].message.content, answer.choices[0].finish_reason
        choices = [chunk.choices[0] async for chunk in answer]
        assert choices[0].delta.role == "assistant"
        return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason

    assert with_client(server, ask) == (reference.text(wanted.tokens), "length")


def test_models(server: Server):
    async def ask(client: AsyncOpenAI):
        return [model.id async for model in client.models.list()]

    assert with_client(server, ask) == ["demo"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_request(server: Server, stream: bool):
    server.wait_until_idle()
    before = sum(m["tokens_generated"] for m in server.status()["members"])

    async def leave(client: AsyncOpenAI):
        work = asyncio.create_task(complete(client, "In the beginning", stream, max_tokens=LONG, temperature=1, seed=1))
        deadline = time.monotonic() + 10
        while not num_requests(await asyncio.to_thread(server.status)):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    with_client(server, leave)
    server.wait_until_idle(3.0)
    made = sum(m["tokens_generated"] for m in server.status()["members"]) - before
    assert made < LONG // 2, "it was not cancelled: it ran to its end"


BAD_REQUESTS = [
    ({"model": "other", "prompt": "x"}, 404, "model 'other' does not exist"),
    ({"model": "demo", "prompt": "x", "max_tokens": 100_000}, 400, "exceed the limit of 1024 tokens"),
    ({"model": "demo", "prompt": "x", "max_tokens": "8"}, 400, "max_tokens"),
    ({"model": "demo", "prompt": "x", "n": 2}, 400, "n is not supported"),
    ({"model": "demo", "prompt": [1, 99_999]}, 400, "token id 99999 is not in the vocabulary"),
    ({"model": "demo"}, 400, "prompt"),
]
JSON = {"Content-Type": "application/json"}


def test_bad_requests_do_not_harm_streams(server: Server, reference: Reference):
    wanted = reference.continuations(4)

    async def both(client: AsyncOpenAI):
        streams = asyncio.gather(*(complete_greedily(client, w, stream=True) for w in wanted))
        answers = []
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as plain:
            while not streams.done():
                for body, _, _ in BAD_REQUESTS:
                    answers.append(await plain.post("/v1/completions", json=body))
                answers.append(await plain.post("/v1/completions", content=b"{not json", headers=JSON))
        with pytest.raises(APIStatusError, match="does not exist"):
            await client.completions.create(model="other", prompt="x")
        return answers, await streams

    answers, streams = with_client(server, both)
    for number, answer in enumerate(answers):
        cases = [*BAD_REQUESTS, (None, 400, "not valid JSON")]
        _, code, reason = cases[number % len(cases)]
        assert answer.status_code == code
        assert reason in answer.json()["error"]["message"]
    for got, continuation in zip(streams, wanted, strict=True):
        assert_equal(got, continuation, reference)


def test_an_idle_cluster_burns_no_cpu(server: Server):
    server.wait_until_idle()
    engines = server.engines().values()

    def used_s() -> float:
        return sum(sum(engine.cpu_times()[:2]) for engine in engines)

    begin, used_before = time.monotonic(), used_s()
    time.sleep(3.0)  # what is measured
    used, elapsed = used_s() - used_before, time.monotonic() - begin
    assert used < 0.1 * elapsed, f"{len(engines)} idle engines used {used:.2f} s of CPU in {elapsed:.2f} s"


def test_metrics(server: Server, reference: Reference):
    def read() -> dict[tuple[str, str], float]:
        answer = httpx.get(f"{server.url}/metrics", timeout=10)
        families = text_string_to_metric_families(answer.text)
        return {(s.name, ",".join(s.labels.values())): s.value for family in families for s in family.samples}

    wanted = reference.continuations(1)[0]
    before = read()
    with_client(server, lambda client: complete_greedily(client, wanted, stream=False))
    after = read()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["elastic_moe_generated_tokens_total", ""] == len(wanted.tokens)
    assert grown["elastic_moe_prompt_tokens_total", ""] == len(wanted.prompt_tokens)
    assert grown["elastic_moe_requests_total", "length"] == 1
    assert grown["elastic_moe_time_to_first_token_seconds_count", ""] == 1
    assert after["elastic_moe_ranks", "serving"] == 4
    assert after["elastic_moe_epoch", ""] == server.status()["epoch"]


def test_status_is_consistent(server: Server):
    wait_until(lambda: all(m["steps"] for m in server.status()["members"]), 5.0, "every rank has made a step")
    status = server.status()
    members = status["members"]
    assert (status["phase"], status["node"]) == ("serving", 0)
    assert [m["rank"] for m in members] == [0, 1, 2, 3]
    assert {m["phase"] for m in members} == {"serving"}
    assert len({m["incarnation"] for m in members}) == 4
    assert {m["pid"] for m in members} <= {p.pid for p in server.processes()}
    assert {(m["placement_version"], m["placement_hash"]) for m in members} == {tuple(status["placement"].values())}
    assert all(m["memory_bytes"] > 0 for m in members)
    (num_experts,) = {m["num_experts"] for m in members}
    for layers in zip(*(m["slots"] for m in members), strict=True):
        assert {expert for slots in layers for expert in slots} == set(range(num_experts))


def test_a_stranger_on_this_host_gets_nothing_and_removes_nobody(server: Server, reference: Reference):
    """It says to every port of every engine what members say, of processes that are there."""
    before = server.status()
    died = PeerDied(1, next(m["incarnation"] for m in before["members"] if m["rank"] == 1))
    words = [
        encode(died),
        encode_request(GiveExpert(0, 0)),
        encode_serving(AskLoads("ask")),
        random.Random(2).randbytes(1000),
    ]
    listening = [
        connection.laddr
        for engine in server.engines().values()
        for connection in engine.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4 * 4
    assert {address.ip for address in listening} == {"127.0.0.1"}
    with zmq.Context() as context:
        context.linger, poller = 0, zmq.Poller()
        for host, port in listening:
            socket = context.socket(zmq.DEALER)
            socket.connect(f"tcp://{host}:{port}")
            poller.register(socket, zmq.POLLIN)
            for word in words:
                socket.send(word)
        assert not poller.poll(1500), "an answer: weights, loads"
        wanted = reference.continuations(1)[0]
        got = with_client(server, lambda client: complete_greedily(client, wanted, stream=False))
    assert_equal(got, wanted, reference)
    after = server.status()
    assert after["epoch"] == before["epoch"]
    assert [m["pid"] for m in after["members"]] == [m["pid"] for m in before["members"]]
