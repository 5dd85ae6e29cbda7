"""The HTTP API over engines without a model: answers, refusals, stops."""

import asyncio
from pathlib import Path

import openai
import pytest
from support.front_end import END, MODEL_LIMIT, FakeEngine, front_end, make_config, until

from elastic_moe.config import ServeConfig
from elastic_moe.serving.front_end.detokenizer import CompletionText
from elastic_moe.serving.protocol import Sampling

pytestmark = pytest.mark.anyio

TEXT = " quick na\u00efve \U0001f600 fox"


async def test_a_stream_has_the_text_of_a_whole_answer(config: ServeConfig):
    async with front_end(config) as fe:
        answer = [*fe.tokens(TEXT), END]
        await fe.join(FakeEngine(0, answer))
        whole = (await fe.complete(max_tokens=100)).json()
        events = await fe.stream(max_tokens=100, stream_options={"include_usage": True})
    assert whole["choices"][0] == {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    assert whole["usage"]["completion_tokens"] == len(answer)
    assert whole["usage"] == events[-1]["usage"]
    assert events[-1]["choices"] == []
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    pieces = [e["choices"][0]["text"] for e in events[:-1]]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces), "the emoji is 4 tokens here"


async def test_chat(config: ServeConfig):
    async with front_end(config) as fe:
        engine = FakeEngine(0, [*fe.tokens(" fox"), END])
        await fe.join(engine)
        answer = (await fe.chat("the dog")).json()
        await fe.chat([{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}])
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": " fox"}
    prompt = fe.tokens("user: the dog\nassistant:")
    assert engine.submits[0].tokens == prompt
    assert engine.submits[1].tokens == prompt
    assert engine.submits[0].max_new_tokens == MODEL_LIMIT - len(prompt), "what fits"


async def test_length(config: ServeConfig):
    async with front_end(config) as fe:
        await fe.join(FakeEngine(0, fe.tokens(TEXT) * 10))
        answer = (await fe.complete()).json()
        assert answer["usage"]["completion_tokens"] == 16
        assert answer["choices"][0]["finish_reason"] == "length"
        assert (await fe.complete(max_tokens=1)).json()["usage"]["completion_tokens"] == 1


async def test_the_openai_client(config: ServeConfig):
    async with front_end(config, http=True) as fe:
        await fe.join(FakeEngine(0, [*fe.tokens(" fox jumps"), END]))
        async with openai.AsyncOpenAI(base_url=f"{fe.url}/v1", api_key="none", max_retries=0) as client:
            assert [m.id async for m in client.models.list()] == ["tiny"]
            assert (await client.models.retrieve("tiny")).id == "tiny"
            plain = await client.completions.create(model="tiny", prompt="the", max_tokens=50)
            chat = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            deltas = [chunk.choices[0].delta.content or "" async for chunk in chat]
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.completions.create(model="gpt", prompt="the")
    assert plain.choices[0].text == " fox jumps"
    assert "".join(deltas) == " fox jumps"


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_end_the_text_and_the_work(config: ServeConfig, stream: bool):
    async with front_end(config, http=True) as fe:
        engine = FakeEngine(0, fe.tokens(" quick brown fox jumps over the lazy dog") * 3)
        await fe.join(engine)
        fields = {"max_tokens": 100, "stop": ["n fox j", "dog"]}
        if stream:
            events = await fe.stream(**fields)
            text = "".join(e["choices"][0]["text"] for e in events)
            finish = events[-1]["choices"][0]["finish_reason"]
        else:
            choice = (await fe.complete(**fields)).json()["choices"][0]
            text, finish = choice["text"], choice["finish_reason"]
        assert (text, finish) == (" quick brow", "stop")
        assert b'requests_total{outcome="stop"} 1.0' in (await fe.client.get("/metrics")).content


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_goes_on_after_a_stop_string_is_told_to_cancel(config: ServeConfig, stream: bool):
    async with front_end(config, http=True) as fe:
        answer = fe.tokens(" fox dog dog dog")
        engine = FakeEngine(0, answer, sends=len(answer) - 1)
        await fe.join(engine)
        fields = {"max_tokens": 100, "stop": "dog"}
        if stream:
            assert await fe.stream(**fields)
        else:
            await fe.complete(**fields)
        await until(lambda: engine.cancels == [engine.submits[0].request_id])


async def test_sampling(config: ServeConfig):
    async with front_end(config) as fe:
        engine = FakeEngine(0, [END])
        await fe.join(engine)
        for fields in ({"temperature": 0}, {"temperature": 0.5, "top_p": 0.9, "seed": 7}, {}, {}):
            await fe.complete(**fields)
    greedy, seeded, unseeded, another = (s.sampling for s in engine.submits)
    assert greedy == Sampling(0.0, 1.0, 0)
    assert seeded == Sampling(0.5, 0.9, 7)
    assert (unseeded.temperature, unseeded.top_p) == (1.0, 1.0)
    assert unseeded.seed != another.seed


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": MODEL_LIMIT}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 5}}, "stream_options.include_usage"),
        ({"model": 5}, "model"),
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "s"}, "suffix"),
        ({"logprobs": 0}, "logprobs"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
    ],
)
async def test_bad_fields_are_named(config: ServeConfig, fields: dict, param: str):
    async with front_end(config) as fe:
        response = await fe.complete(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert param.split(".")[0] in error["message"] or "tokens" in error["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [{"role": "user"}],
        [{"role": "robot", "content": "hi"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": "\udfff"}],
    ],
)
async def test_bad_messages_are_refused(config: ServeConfig, messages: object):
    async with front_end(config) as fe:
        response = await fe.chat(messages=messages)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"\xff\xff", 400),
        ("POST", "/v1/completions", b"[]", 400),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("POST", "/v1/completions", b'{"model": "other", "prompt": "a"}', 404),
        ("GET", "/v1/models/other", b"", 404),
        ("GET", "/nothing", b"", 404),
        ("GET", "/v1/completions", b"", 405),
    ],
)
async def test_every_refusal_has_the_same_body(
    config: ServeConfig, method: str, path: str, content: bytes, status: int
):
    async with front_end(config) as fe:
        response = await fe.client.request(method, path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_fields_that_change_nothing_are_taken(config: ServeConfig):
    async with front_end(config) as fe:
        await fe.join(FakeEngine(0, [END]))
        neutral = {"n": 1, "echo": False, "logit_bias": {}, "presence_penalty": 0.0, "user": "me", "logprobs": None}
        assert (await fe.complete(prompt=["the"], **neutral)).status_code == 200
        assert (await fe.complete(prompt=[[5, 6]], stop=None)).status_code == 200


async def test_the_limit_is_the_smallest_of_all(checkpoint: Path):
    async with front_end(make_config(checkpoint, kv_cache_tokens=64)) as fe:
        response = await fe.complete(max_tokens=64)
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert fe.model.max_model_len == 64
        response = await fe.chat("a" * 100)
        assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_a_model_without_chat_template_says_so(config: ServeConfig):
    async with front_end(config) as fe:
        fe.model._tokenizer.chat_template = None
        response = await fe.chat()
        assert response.status_code == 400
        assert "chat template" in response.json()["error"]["message"]
        fe.model._tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        response = await fe.chat()
        assert response.status_code == 400
        assert "roles must alternate" in response.json()["error"]["message"]


async def test_too_many_requests(checkpoint: Path):
    async with front_end(make_config(checkpoint, max_waiting=1)) as fe:
        first = asyncio.create_task(fe.complete())
        await until(lambda: fe.gateway.status().requests.waiting == 1)
        refused = await fe.complete()
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        await fe.join(FakeEngine(0, [END]))
        assert (await first).status_code == 200
        assert (await fe.complete()).status_code == 200


async def test_an_engine_error_is_told(config: ServeConfig):
    async with front_end(config) as fe:
        engine = FakeEngine(0, fe.tokens(TEXT), sends=2)
        await fe.join(engine)
        answer = asyncio.create_task(fe.complete(max_tokens=100))
        await until(lambda: len(engine.submits) == 1)
        await engine.send(engine.submits[0].request_id, 2, [], "error", "out of pages")
        response = await answer
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "out of pages"
        events = asyncio.create_task(fe.stream(max_tokens=100))
        await until(lambda: len(engine.submits) == 2)
        await engine.send(engine.submits[1].request_id, 2, [], "error", "out of pages")
        assert (await events)[-1]["error"]["message"] == "out of pages"


async def test_a_bug_shows_no_traceback(config: ServeConfig, monkeypatch: pytest.MonkeyPatch):
    async with front_end(config) as fe:
        await fe.join(FakeEngine(0, [5, 6, END]))
        monkeypatch.setattr(CompletionText, "push", lambda *arguments: 1 / 0)
        response = await fe.complete()
        assert response.status_code == 500
        assert "ZeroDivision" not in response.text
        assert response.json()["error"]["type"] == "server_error"
        assert fe.gateway.status().requests.running == 0, "the request is dropped"
