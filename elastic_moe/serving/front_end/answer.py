"""The way of an answer to its client, whole or as server-sent events, and its end when the client leaves."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from elastic_moe.errors import ElasticError
from elastic_moe.serving.front_end.api_errors import api_error
from elastic_moe.serving.front_end.connection import Connection
from elastic_moe.serving.front_end.detokenizer import CompletionText
from elastic_moe.serving.front_end.gateway import Generation
from elastic_moe.serving.front_end.openai_schema import AnswerFormat, event, usage

Result = TypeVar("Result")


class EventStream(StreamingResponse):
    """Server-sent events of one generation, which ends with the response, whatever way that ends.

    Most tokens are written in the gateway's turn, by `_write_at_once`; the response's own task begins, ends, and does
    what has to be waited for.
    """

    def __init__(
        self, generation: Generation, text: CompletionText, form: AnswerFormat, *, include_usage: bool
    ) -> None:
        """`text` becomes that of the generation, and is written in `form`."""
        super().__init__(self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._generation = generation
        self._text = text
        self._form = form
        self._include_usage = include_usage
        self._connection: Connection | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        self._connection = Connection.of(scope)
        with self._generation:
            await while_connected(receive, self.stream_response(send))

    async def _events(self) -> AsyncIterator[bytes]:
        """What is left to the task. After the first event a failure can only be told by another."""
        generation, text, form = self._generation, self._text, self._form
        try:
            for chunk in form.opening():
                yield event(chunk)
            while not text.finish:
                piece = text.push(*await generation.update(self._write_at_once))
                if piece:
                    yield form.piece(piece)
            generation.outcome = text.finish
            yield event(form.closing(text.finish))
            if self._include_usage:
                yield event(form.counts(usage(len(generation.entry.prompt), text.num_tokens)))
        except ElasticError as error:
            yield event(api_error(error).body)
        yield b"data: [DONE]\n\n"

    def _write_at_once(self) -> bool:
        """Write what new tokens say. False: there is something to wait for, or the text has ended."""
        connection, text, generation = self._connection, self._text, self._generation
        if connection is None or connection.is_full or text.finish or generation.entry.finish:
            return False
        if piece := text.push(*generation.read()):
            connection.write_chunk(self._form.piece(piece))
        return not text.finish


async def whole_text(generation: Generation, text: CompletionText) -> str:
    """Everything that `text` becomes, at its end."""
    pieces = []
    while not text.finish:
        pieces.append(text.push(*await generation.update()))
    generation.outcome = text.finish
    return "".join(pieces)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`; None, with `work` cancelled, when the client leaves before it is done."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
