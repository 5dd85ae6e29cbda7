"""Engines that speak the protocol without a model, and a front end over them, all in one event loop."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import zmq
import zmq.asyncio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from elastic_moe.config import ModelConfig, ServeConfig, ServerConfig, ServingConfig
from elastic_moe.group.view import Member, View
from elastic_moe.serving.front_end.app import create_app
from elastic_moe.serving.front_end.gateway import Gateway
from elastic_moe.serving.front_end.listener import listen
from elastic_moe.serving.front_end.metrics import Metrics
from elastic_moe.serving.front_end.process import HttpServer
from elastic_moe.serving.front_end.served_model import ServedModel
from elastic_moe.serving.protocol import Cancel, Hello, Status, Step, Submit, Tokens, decode_to_engine, encode
from launch.sse import events

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TRAINING_TEXT = ["the quick brown fox jumps over the lazy dog", "user: assistant: system:\n", "na\u00efve caf\u00e9"]
VOCABULARY = 300
END = 0
"""The end-of-sequence token."""
MODEL_LIMIT = 256
DEADLINE_S = 20.0


def byte_level_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learned from the texts; it can spell every other text too. Token 0 is `<end>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<end>"])
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_checkpoint(folder: Path) -> Path:
    """A checkpoint folder as far as a front end looks into it: tokenizer and config.json, no weights."""
    tokenizer = byte_level_tokenizer(TRAINING_TEXT, VOCABULARY)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(folder)
    config = {"model_type": "qwen3_moe", "vocab_size": VOCABULARY, "max_position_embeddings": MODEL_LIMIT}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_config(checkpoint: Path, max_waiting: int = 64, kv_cache_tokens: int = 32768) -> ServeConfig:
    """A configuration that serves `checkpoint` as model `tiny` on any free port."""
    return ServeConfig(
        model=ModelConfig(name="tiny", path=str(checkpoint)),
        serving=ServingConfig(kv_cache_tokens=kv_cache_tokens),
        server=ServerConfig(port=0, max_waiting=max_waiting),
    )


class FakeEngine:
    """One engine process: answers every request with the same tokens, as far as the request allows."""

    def __init__(self, rank: int, answer: list[int], *, sends: int | None = None) -> None:
        """`answer` ends with `stop`; only its first `sends` tokens are sent (None: all)."""
        self.answer = answer
        self.sends = sends
        self.phase, self.reason = "serving", ""
        self.running = 0
        self.hellos = 0
        self.submits: list[Submit] = []
        self.cancels: list[str] = []
        self._unfinished: set[str] = set()
        self._context = zmq.asyncio.Context.instance()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.member = Member(
            rank,
            0,
            f"incarnation-{rank}-{port}",
            4000 + rank,
            "host",
            "",
            "",
            f"tcp://127.0.0.1:{port}",
            weights="tcp://127.0.0.1:1",
        )
        self.view = View(1, (self.member,))
        """What it believes, and reports."""
        self._front_ends: set[bytes] = set()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def send(self, request_id: str, start: int, tokens: list[int], finish: str = "", error: str = "") -> None:
        """Send tokens of a request, right or wrong."""
        if finish:
            self._unfinished.discard(request_id)
        message = Step([Tokens(request_id, self.member.incarnation, start, tokens, finish, error)])
        for front_end in self._front_ends:
            await self._socket.send_multipart([front_end, encode(message)])

    async def report(self) -> None:
        """Send a status to every front end."""
        status = Status(
            rank=self.member.rank,
            incarnation=self.member.incarnation,
            phase=self.phase,
            reason=self.reason,
            view=self.view,
            placement_version=3,
            placement_hash="abc",
            slots=[[0, 1], [1, -1]],
            num_experts=2,
            running=self.running + len(self._unfinished),
            tokens_generated=7,
            memory_bytes=1 << 20,
        )
        for front_end in self._front_ends:
            await self._socket.send_multipart([front_end, encode(status)])

    def close(self) -> None:
        """Die: nothing is sent or read any more."""
        self._task.cancel()
        self._socket.close()

    async def _run(self) -> None:
        while True:
            front_end, frame = await self._socket.recv_multipart()
            self._front_ends.add(front_end)
            message = decode_to_engine(frame)
            if isinstance(message, Hello):
                self.hellos += 1
                await self.report()
            elif isinstance(message, Cancel):
                self.cancels.append(message.request_id)
                self._unfinished.discard(message.request_id)
            elif isinstance(message, Submit):
                self.submits.append(message)
                self._unfinished.add(message.request_id)
                await self._generate(message)

    async def _generate(self, request: Submit) -> None:
        first, end = request.num_generated, request.num_generated + request.max_new_tokens
        answer = self.answer[:end]
        finish = "length" if len(answer) == end else "stop"
        upto = len(answer) if self.sends is None else min(self.sends, len(answer))
        for position in range(first, upto):
            last = position == len(answer) - 1
            await self.send(request.request_id, position, [answer[position]], finish if last else "")


@dataclass
class FrontEnd:
    """A front end under test."""

    gateway: Gateway
    model: ServedModel
    client: httpx.AsyncClient
    url: str
    engines: list[FakeEngine] = field(default_factory=list)
    epoch: int = 0

    def show(self, *engines: FakeEngine) -> None:
        """Make `engines` the members of the next view."""
        self.epoch += 1
        self.engines = sorted({*self.engines, *engines}, key=lambda e: e.member.rank)
        members = sorted((e.member for e in engines), key=lambda m: m.rank)
        self.gateway.set_view(View(self.epoch, tuple(members)))

    async def join(self, *engines: FakeEngine) -> None:
        """Make `engines` the members and wait until they serve."""
        self.show(*engines)
        await until(lambda: self.gateway.status().phase == "serving")

    async def complete(self, prompt: object = "the", **fields: object) -> httpx.Response:
        """POST /v1/completions."""
        return await self.post("/v1/completions", prompt=prompt, **fields)

    async def chat(self, content: object = "the", **fields: object) -> httpx.Response:
        """POST /v1/chat/completions."""
        messages = [{"role": "user", "content": content}]
        return await self.post("/v1/chat/completions", **{"messages": messages, **fields})

    async def post(self, path: str, **fields: object) -> httpx.Response:
        """POST a JSON object, in ASCII."""
        body = json.dumps({"model": "tiny", **fields})
        return await self.client.post(path, content=body, headers={"content-type": "application/json"})

    async def stream(self, prompt: str = "the", **fields: object) -> list[dict]:
        """All events of a streamed completion."""
        return [event async for event in self.events(prompt, **fields)]

    async def events(self, prompt: str = "the", **fields: object) -> AsyncIterator[dict]:
        """The events of a streamed completion."""
        body = {"model": "tiny", "prompt": prompt, "stream": True, **fields}
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for event in events(response):
                yield json.loads(event)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.model._tokenizer(text)["input_ids"]


@contextlib.asynccontextmanager
async def front_end(config: ServeConfig, *, http: bool = False) -> AsyncIterator[FrontEnd]:
    """A front end without its process; with `http` behind a real server, else driven in memory."""
    async with asyncio.TaskGroup() as tasks:
        gateway = Gateway(tasks, Metrics(), max_in_flight=config.server.max_waiting)
        model = ServedModel.load(config)
        app = create_app(gateway, model)
        transport, url, server = httpx.ASGITransport(app, raise_app_exceptions=False), "http://test", None
        if http:
            listener, server = listen(config.server), HttpServer(app, "warning")
            transport, url = None, f"http://127.0.0.1:{listener.getsockname()[1]}"
            tasks.create_task(server.serve([listener]))
        async with httpx.AsyncClient(transport=transport, base_url=url, timeout=DEADLINE_S) as client:
            under_test = FrontEnd(gateway, model, client, url)
            try:
                async with asyncio.timeout(DEADLINE_S):
                    yield under_test
            finally:
                gateway.stop("the test is over")
                if server is not None:
                    server.should_exit = True
                gateway.close()
                model.close()
                for engine in under_test.engines:
                    engine.close()


async def until(condition: Callable[[], bool], within_s: float | None = None) -> None:
    """Wait for `condition`, `within_s` seconds at most; else the test's deadline bounds it."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
