"""A client's connection, as uvicorn keeps it, and a way for a response to write to it without being awaited."""

import asyncio

from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

NAME = "connection"


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, known to the responses that it carries.

    Between the head of a response without a length and its end, a chunk may be written past ASGI and h11, which take
    longer than the kernel: to h11 one chunk is like any other, and none changes its state.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See the base; `app_state` is in the scope of each request."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, NAME: self}

    @classmethod
    def of(cls, scope: Scope) -> "Connection | None":
        """The connection of a request. None where chunks cannot be written: HTTP/1.0, another server, a test in
        memory."""
        return scope.get("state", {}).get(NAME) if scope["http_version"] == "1.1" else None

    @property
    def is_full(self) -> bool:
        """Whether the client reads too slowly: who awaits `send` waits for it now."""
        return self.flow.write_paused

    def write_chunk(self, body: bytes) -> None:
        """A part of a response's body, not empty. A client that has left reads nothing, and nobody minds."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
