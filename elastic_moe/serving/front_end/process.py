"""The front-end process of a node: `python -m elastic_moe.serving.front_end.process --listen-fd M --supervisor-fd N`.

It lives as long as its supervisor's end of the channel, and closes within two seconds of SIGTERM or SIGINT.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn

from elastic_moe.background import end_process, start_thread
from elastic_moe.serving.front_end.app import create_app
from elastic_moe.serving.front_end.connection import Connection
from elastic_moe.serving.front_end.gateway import Gateway
from elastic_moe.serving.front_end.listener import url_of
from elastic_moe.serving.front_end.metrics import Metrics
from elastic_moe.serving.front_end.served_model import ServedModel
from elastic_moe.serving.starts import FrontEndStart
from elastic_moe.supervision.channel import Channel, Ready, Refused, ViewChanged

REFUSED_EXIT_CODE = 2
CLOSING_TIMEOUT_S = 1
"""How long open streams may take to send their last event when the front end stops."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until the supervisor is gone or a signal comes; returns the exit code.

    `arguments` stand in for those of the command line.
    """
    parser = argparse.ArgumentParser(description="HTTP front end of one node; started by its supervisor")
    parser.add_argument("--supervisor-fd", type=int, required=True, help="this end of the channel to the supervisor")
    parser.add_argument("--listen-fd", type=int, required=True, help="the listening socket, bound by the supervisor")
    fds = parser.parse_args(arguments)
    channel = Channel.of_child(fds.supervisor_fd, FrontEndStart | ViewChanged)
    listener = socket.socket(fileno=fds.listen_fd)
    start = channel.receive()
    if start is None:
        return 0
    if not isinstance(start, FrontEndStart):
        raise TypeError(f"the first message must be FrontEndStart, got {start!r}")
    logging.basicConfig(level=start.config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        model = ServedModel.load(start.config)
    except ValueError as error:
        channel.send(Refused(reason=str(error)))
        return REFUSED_EXIT_CODE
    gc.freeze()  # all that was imported stays: looking through it again and again takes a tenth of a token's time
    with contextlib.closing(model):
        asyncio.run(serve(start, listener, model, channel))
    return 0


async def serve(start: FrontEndStart, listener: socket.socket, model: ServedModel, channel: Channel) -> None:
    """Serve HTTP on `listener`, following the views of `channel`, until it ends or a signal comes."""
    loop, config = asyncio.get_running_loop(), start.config
    inbox: asyncio.Queue[object | None] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, inbox.put_nowait, None)
    start_thread("supervisor", _receive, channel, loop, inbox, on_error=end_process)
    async with asyncio.TaskGroup() as tasks:
        gateway = Gateway(
            tasks,
            Metrics(),
            max_in_flight=config.server.max_waiting,
            node=start.node,
            eplb_mode=config.eplb.mode,
            wire=start.wire,
        )
        with contextlib.closing(gateway):
            server = HttpServer(create_app(gateway, model, start.wire.token), config.log_level)
            serving = tasks.create_task(server.serve([listener]))
            channel.send(Ready(detail=url_of(listener)))
            while isinstance(message := await inbox.get(), ViewChanged):
                gateway.set_view(message.view)
            gateway.stop("the server is stopping")
            server.should_exit = True
            await serving


class HttpServer(uvicorn.Server):
    """uvicorn, but signals are the process's business and not its own."""

    def __init__(self, app: object, log_level: str) -> None:
        """`app` is the ASGI application."""
        super().__init__(
            uvicorn.Config(
                app,  # pyright: ignore[reportArgumentType]
                http=Connection,
                lifespan="off",
                ws="none",
                access_log=False,
                log_config=None,
                log_level=log_level,
                timeout_graceful_shutdown=CLOSING_TIMEOUT_S,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signal handlers as they are."""
        yield


def _receive(channel: Channel, loop: asyncio.AbstractEventLoop, inbox: "asyncio.Queue[object | None]") -> None:
    """Pass the supervisor's messages to the event loop, None at the end of them. Runs in a thread."""
    with contextlib.suppress(RuntimeError):  # the loop has closed: the process is ending
        while (message := channel.receive()) is not None:
            loop.call_soon_threadsafe(inbox.put_nowait, message)
        loop.call_soon_threadsafe(inbox.put_nowait, None)


if __name__ == "__main__":
    sys.exit(main())
