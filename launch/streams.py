"""Streams as clients ask for them: seeded requests, all at once, and what comes of each."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import msgspec

from launch.sse import events

PROMPTS = (
    "In the beginning God created",
    "And the LORD said unto Moses,",
    "The LORD is my shepherd;",
    "And it came to pass in those days, that",
    "Blessed are the meek: for",
    "Now the sons of Jacob were",
    "And David the king said unto",
    "Verily, verily, I say unto you,",
    "Then Pharaoh called for",
    "And when he had opened the seventh seal,",
    "Paul, an apostle of Jesus Christ",
    "The words of the Preacher, the son of David,",
    "To install a package on a Debian system,",
    "The configuration file of the server is",
    "The apt-get command",
    "In order to upgrade the distribution,",
    "A network interface can be configured",
    "The kernel modules are",
    "System logs are kept in",
    "To create a new user, the administrator",
    "Mail servers such as Postfix",
    "The partitioning of the disk",
    "The str.join() method",
    "A list comprehension consists of",
    "The following example shows how to use",
    "Return a new array of bytes.",
    "If the file cannot be opened, an OSError",
    "The asyncio event loop",
    "Changed in version 3.8:",
    "Class methods can be called",
    "The logging module defines",
    "Raises a ValueError if",
)
LENGTHS = (24, 64)
"""Fewest and most tokens of an answer."""
TIMEOUT_S = 120.0
"""Deadline of one stream."""
LAG_POLL_S = 0.02


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int


@dataclass
class Answer:
    """What came of a request, so far."""

    text: str = ""
    finish: str = ""
    num_tokens: int = 0
    error: str = ""
    arrivals: list[float] = field(default_factory=list)
    """Wall-clock time of each piece of text."""


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What came of a load."""

    answers: tuple[Answer, ...]
    client_lag_s: float = 0.0
    """See `Load.lag_s`."""

    @property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between each two pieces of each stream."""
        return [gap * 1e3 for gap in gaps_s(self.answers)]


def make_asks(seed: int, count: int) -> list[Ask]:
    """`count` requests, every other one greedy, as a function of the seed."""
    rng = random.Random(f"load {seed}")
    prompts = [prompt for _ in range(-(-count // len(PROMPTS))) for prompt in rng.sample(PROMPTS, len(PROMPTS))]
    return [
        Ask(prompt, rng.randint(*LENGTHS), temperature=0.8 * (i % 2), seed=rng.randrange(2**31))
        for i, prompt in enumerate(prompts[:count])
    ]


def greedy_asks(prompts: Sequence[str], count: int, num_tokens: int, num_words: int = 0) -> list[Ask]:
    """`count` greedy requests over the prompts, again and again; each made longer, by those after it, to at least
    `num_words` words, so that no two begin alike."""

    def prompt(number: int) -> str:
        words: list[str] = []
        while not words or len(words) < num_words:
            words += prompts[(number + len(words)) % len(prompts)].split() if words else [prompts[number]]
        return " ".join(words)

    return [Ask(prompt(i % len(prompts)), num_tokens, temperature=0.0, seed=0) for i in range(count)]


def gaps_s(answers: Sequence[Answer]) -> list[float]:
    """Seconds between each two pieces of each stream."""
    return [b - a for answer in answers for a, b in zip(answer.arrivals, answer.arrivals[1:], strict=False)]


class Load:
    """All requests at once. `answers` fill while it runs."""

    def __init__(self, url: str, model: str, asks: Sequence[Ask]) -> None:
        """Nothing is sent before `run`."""
        self.answers = [Answer() for _ in asks]
        self.lag_s = 0.0
        """The longest that this very process was kept from running: gaps of that size are the machine's."""
        self._url = url
        self._model = model
        self._asks = asks

    @property
    def num_pieces(self) -> int:
        """Pieces of text that have arrived."""
        return sum(len(answer.arrivals) for answer in self.answers)

    async def run(self, goes_on: Callable[[], bool] = lambda: False) -> None:
        """Stream all answers to their end; what fails says so in its answer.

        If then all is well and it `goes_on`, all is asked again, and `answers` grow by as many.
        """
        lag = asyncio.create_task(self._watch_lag())
        try:
            answers = list(self.answers)
            await self._stream_all(answers)
            while all(answer.finish for answer in answers) and goes_on():
                answers = [Answer() for _ in self._asks]
                self.answers += answers
                await self._stream_all(answers)
        finally:
            lag.cancel()

    async def _watch_lag(self) -> None:
        while True:
            begin = time.monotonic()
            await asyncio.sleep(LAG_POLL_S)
            self.lag_s = max(self.lag_s, time.monotonic() - begin - LAG_POLL_S)

    async def _stream_all(self, answers: Sequence[Answer]) -> None:
        """Over new connections: a server closes one that nobody used for some seconds, maybe just as it is used again,
        which would look like a fault."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S, limits=limits) as client:
            streams = (self._stream(client, ask, one) for ask, one in zip(self._asks, answers, strict=True))
            await asyncio.gather(*streams)

    async def _stream(self, client: httpx.AsyncClient, ask: Ask, answer: Answer) -> None:
        """By hand and not by the package `openai`, which takes several times as long for a chunk: a client that is
        busy would measure itself."""
        body = {
            "model": self._model,
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with asyncio.timeout(TIMEOUT_S), client.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    answer.error = f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:200]}"
                    return
                async for event in events(response):
                    _take(_decode(event), answer)
        except (httpx.HTTPError, OSError, TimeoutError, ValueError) as error:
            answer.finish, answer.error = "", f"{type(error).__name__}: {error}"


def _take(chunk: "_Chunk", answer: Answer) -> None:
    if chunk.error:
        raise OSError(chunk.error.message)
    for choice in chunk.choices:
        if choice.text:
            answer.arrivals.append(time.time())
            answer.text += choice.text
        answer.finish = choice.finish_reason or answer.finish
    if chunk.usage:
        answer.num_tokens = chunk.usage.completion_tokens


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Error(msgspec.Struct):
    message: str


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Chunk).decode
