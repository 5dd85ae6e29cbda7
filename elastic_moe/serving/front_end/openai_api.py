"""The OpenAI API: /v1/completions, /v1/chat/completions, /v1/models."""

import time
from http import HTTPStatus

import msgspec
from fastapi import APIRouter, Request, Response

from elastic_moe.serving.front_end.answer import EventStream, while_connected, whole_text
from elastic_moe.serving.front_end.api_errors import ApiError
from elastic_moe.serving.front_end.detokenizer import CompletionText, Detokenizer
from elastic_moe.serving.front_end.gateway import Gateway
from elastic_moe.serving.front_end.openai_schema import (
    AnswerFormat,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    usage,
)
from elastic_moe.serving.front_end.served_model import ServedModel

DEFAULT_COMPLETION_TOKENS = 16


class OpenAIApi:
    """The endpoints, over one gateway and one model."""

    def __init__(self, gateway: Gateway, model: ServedModel) -> None:
        """`gateway` generates tokens for `model`."""
        self._gateway = gateway
        self._model = model

    def router(self) -> APIRouter:
        """The routes, to be included in an application."""
        router = APIRouter(prefix="/v1")
        router.post("/completions")(self.completions)
        router.post("/chat/completions")(self.chat_completions)
        router.get("/models")(self.models)
        router.get("/models/{name:path}")(self.model)
        return router

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt."""
        self._check(body)
        prompt = await self._model.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        self._check_tokens(prompt)
        return await self._answer(body, request, prompt, body.max_tokens or DEFAULT_COMPLETION_TOKENS)

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation. Without a limit, the answer may fill the model's context."""
        self._check(body)
        try:
            prompt = await self._model.encode_chat([m.model_dump() for m in body.messages])
        except ValueError as error:
            raise ApiError(HTTPStatus.BAD_REQUEST, f"messages: {error}", "messages") from error
        self._check_tokens(prompt)
        room = max(1, self._model.max_model_len - len(prompt))
        return await self._answer(body, request, prompt, body.max_completion_tokens or body.max_tokens or room)

    async def models(self) -> Response:
        """The one model there is, as a list."""
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        """The one model there is, by its name."""
        self._check_name(name)
        return _json(self._card())

    def _card(self) -> dict[str, object]:
        model = self._model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "elastic_moe",
            "max_model_len": model.max_model_len,
        }

    def _check(self, body: GenerationRequest) -> None:
        self._check_name(body.model)
        body.refuse_unsupported()

    def _check_name(self, name: str) -> None:
        if name != self._model.name:
            message = f"model {name!r} does not exist; this server has {self._model.name!r}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, "model", "model_not_found")

    def _check_tokens(self, prompt: list[int]) -> None:
        vocab_size = self._model.vocab_size
        wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wrong is not None:
            message = f"prompt: token id {wrong} is not in the vocabulary (0 to {vocab_size - 1})"
            raise ApiError(HTTPStatus.BAD_REQUEST, message, "prompt")
        if not prompt:
            raise ApiError(HTTPStatus.BAD_REQUEST, "prompt: it has no tokens", "prompt")

    async def _answer(self, body: GenerationRequest, request: Request, prompt: list[int], max_tokens: int) -> Response:
        """Generate, and answer whole or as a stream."""
        limit = self._model.max_model_len
        if len(prompt) + max_tokens > limit:
            message = f"{len(prompt)} prompt tokens and {max_tokens} to generate exceed the limit of {limit} tokens"
            raise ApiError(HTTPStatus.BAD_REQUEST, message, "max_tokens", "context_length_exceeded")
        text = CompletionText(Detokenizer(self._model.decode, prompt), body.stop)
        generation = self._gateway.open(prompt, max_tokens, body.sampling())
        form = AnswerFormat(
            request_id=generation.entry.request_id,
            model=self._model.name,
            created=int(time.time()),
            chat=isinstance(body, ChatRequest),
        )
        if body.stream:
            return EventStream(generation, text, form, include_usage=body.include_usage)
        with generation:
            whole = await while_connected(request.receive, whole_text(generation, text))
        if whole is None:
            return Response(status_code=HTTPStatus.NO_CONTENT)  # nobody is there to read it
        return _json(form.whole(whole, text.finish, usage(len(prompt), text.num_tokens)))


def _json(content: dict[str, object]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
