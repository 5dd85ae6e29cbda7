"""A front end's line to one engine process, and what it last heard from it."""

import logging

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from elastic_moe.group.view import Member
from elastic_moe.serving.front_end.routing import STATUS_MAX_AGE_S, RankLoad
from elastic_moe.serving.protocol import Phase, Status, Submit, ToEngine, ToFrontEnd, decode_to_front_end, encode
from elastic_moe.wire import PLAIN, Wire

logger = logging.getLogger(__name__)


class EngineLink:
    """A DEALER socket to one member of the view. It lives as long as that process is a member."""

    def __init__(self, context: zmq.asyncio.Context, member: Member, wire: Wire = PLAIN) -> None:
        """Connect to `member.address`; messages queue until the engine answers."""
        self.member = member
        self.status: Status | None = None
        """The latest report of this process."""
        self._reported_at_s = 0.0
        self._submitted_since_report = 0
        self._socket = wire.client(context.socket(zmq.DEALER))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # no limit: what is on its way is bounded by server.max_waiting
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(member.address)

    def send(self, message: ToEngine) -> None:
        """Send without waiting. Nobody hears of a loss here: a lost engine leaves the view."""
        if isinstance(message, Submit):
            self._submitted_since_report += 1
        self._socket.send(encode(message))  # without a limit it is queued at once, so there is nothing to await

    async def receive(self) -> ToFrontEnd:
        """The next message of the engine. One that cannot be read is logged and left out."""
        while True:
            frame = await self._socket.recv()
            try:
                return decode_to_front_end(frame)
            except ValueError as error:
                logger.error("rank %d sent a message that cannot be read: %s", self.member.rank, error)  # noqa: TRY400

    async def lost(self) -> None:
        """Wait until the connection to the engine ends: it has died, or its host says so. Until the next report nothing
        is given to it."""
        await recv_monitor_message(self._monitor)
        self.status = None

    def heard(self, status: Status, now_s: float) -> None:
        """Keep a report, unless it is another process's."""
        if status.incarnation == self.member.incarnation:
            self.status = status
            self._reported_at_s = now_s
            self._submitted_since_report = 0

    def load(self, now_s: float) -> RankLoad:
        """What routing needs to know of this rank."""
        status = self.status
        if status is None or now_s - self._reported_at_s > STATUS_MAX_AGE_S:
            return RankLoad(self.member.rank, Phase.SILENT, 0)
        load = status.running + status.waiting + self._submitted_since_report
        return RankLoad(self.member.rank, status.phase, load)

    def close(self) -> None:
        """Disconnect; what was not sent yet is dropped."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
