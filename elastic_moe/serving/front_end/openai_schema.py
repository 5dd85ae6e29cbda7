"""What clients may send to the OpenAI API, and what they get back."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, field_validator

from elastic_moe.serving.front_end.api_errors import ApiError
from elastic_moe.serving.protocol import Sampling

MAX_STOPS = 4
SEED_BITS = 63

_TEXT_ONLY = {"type": "text"}
_ALLOWED: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": (_TEXT_ONLY,),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "top_k": (0, -1),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
}
"""Fields of OpenAI's API, and of servers like it, that would change the answer, with the values that do not (null never
does). Any other unknown field is ignored."""


def _check_unicode(text: str) -> str:
    """JSON can write half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is not valid Unicode: {error.reason} at character {error.start}") from error
    return text


class StreamOptions(BaseModel):
    """`stream_options` of a request."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What both endpoints have in common. Types are taken strictly: "1" is not 1."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**SEED_BITS)] = None
    stop: list[str] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: object) -> list[str]:
        stops = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"must be a string or a list of up to {MAX_STOPS} strings, none of them empty")
        return stops

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> Sampling:
        """How to pick tokens. Without a seed a random one is drawn here, so that a request that moves goes on alike."""
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature == 0:
            return Sampling()
        seed = secrets.randbits(SEED_BITS) if self.seed is None else self.seed
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, seed)

    def refuse_unsupported(self) -> None:
        """Raise ApiError for the first field that asks for something this server does not do."""
        for name, value in (self.model_extra or {}).items():
            allowed = _ALLOWED.get(name)
            if allowed is None or value is None or any(type(value) is type(a) and value == a for a in allowed):
                continue
            usable = " or ".join(repr(a) for a in allowed[:1]) or "null"
            raise ApiError(
                HTTPStatus.BAD_REQUEST, f"{name} is not supported: leave it out, or send {usable}", name, "unsupported"
            )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[int]
    """A text, or its token ids; either may come as a list of exactly one."""

    @field_validator("prompt", mode="plain")
    @classmethod
    def _check_prompt(cls, value: object) -> str | list[int]:
        if isinstance(value, list) and value and isinstance(value[0], str | list):
            if len(value) > 1:
                raise ValueError(f"one prompt a request, got {len(value)}")
            value = value[0]
        if not isinstance(value, str) and not (isinstance(value, list) and all(type(t) is int for t in value)):
            raise ValueError("must be a string, a list of token ids, or a list of exactly one of these")
        if not value:
            raise ValueError("must not be empty")
        return _check_unicode(value) if isinstance(value, str) else value


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="plain")
    @classmethod
    def _join_parts(cls, value: object) -> str:
        parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
        texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
        texts = [text for text in texts if isinstance(text, str)]
        if len(texts) < len(parts):
            raise ValueError('must be a string, or a list of parts {"type": "text", "text": string}')
        return _check_unicode("".join(texts))


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None


def usage(num_prompt: int, num_completion: int) -> dict[str, int]:
    """Token counts of an answer."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


def event(content: Mapping[str, object]) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


@dataclass(frozen=True)
class AnswerFormat:
    """How the answer to one request is written: `chat` or plain completion, whole or in chunks."""

    request_id: str
    model: str
    created: int
    chat: bool

    def whole(self, text: str, finish: str, counts: Mapping[str, int]) -> dict[str, object]:
        """The answer to a request without streaming."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._envelope([self._choice(content, finish)]) | {"usage": counts}

    def opening(self) -> list[dict[str, object]]:
        """Chunks before the first text."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] if self.chat else []

    def piece(self, text: str) -> bytes:
        """The event of a chunk with new text. There is one for almost every token, and only the text differs."""
        before, after = self._around_piece
        return before + msgspec.json.encode(text) + after

    @cached_property
    def _around_piece(self) -> tuple[bytes, bytes]:
        chunk = self._chunk({"delta": {"content": "\0"}} if self.chat else {"text": "\0"})
        before, _, after = event(chunk).rpartition(msgspec.json.encode("\0"))
        return before, after

    def closing(self, finish: str) -> dict[str, object]:
        """The chunk that says why the text ended."""
        return self._chunk({"delta": {}} if self.chat else {"text": ""}, finish)

    def counts(self, counts: Mapping[str, int]) -> dict[str, object]:
        """The chunk with the token counts, after all others."""
        return self._envelope([], ".chunk") | {"usage": counts}

    def _chunk(self, content: dict[str, Any], finish: str | None = None) -> dict[str, object]:
        return self._envelope([self._choice(content, finish)], ".chunk")

    def _choice(self, content: dict[str, Any], finish: str | None) -> dict[str, object]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}

    def _envelope(self, choices: list[dict[str, object]], part: str = "") -> dict[str, object]:
        prefix, kind = ("chatcmpl", "chat.completion" + part) if self.chat else ("cmpl", "text_completion")
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
