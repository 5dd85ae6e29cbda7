"""Server-sent events, as the servers here send them: one line of data each, `[DONE]` at the end of a completion."""

from collections.abc import AsyncIterator

import httpx

DATA = "data: "
DONE = "data: [DONE]"


async def events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each event, as it comes; ValueError when a line is no event."""
    async for line in response.aiter_lines():
        if not line or line == DONE:
            continue
        if not line.startswith(DATA):
            raise ValueError(f"not an event: {line[:200]!r}")
        yield line.removeprefix(DATA)
