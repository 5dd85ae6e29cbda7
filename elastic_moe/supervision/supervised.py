"""The child's side of a supervisor, for any script: `elastic_moe.supervise` started it, and may start it again."""

import os
import time
from collections.abc import Callable

from elastic_moe.background import end_process, start_thread
from elastic_moe.group.view import View
from elastic_moe.membership.launch import Launch, SeatStart
from elastic_moe.supervision.channel import Beat, Channel, Done, ViewChanged


class Supervised:
    """The line to the supervisor of this process."""

    def __init__(self, channel: Channel, start: SeatStart) -> None:
        """`start` is what the supervisor said first."""
        self.start = start
        self._channel = channel

    @classmethod
    def of_launch(cls, launch: Launch) -> "Supervised | None":
        """None for a process that has no supervisor."""
        if launch.supervisor_fd is None:
            return None
        channel = Channel.of_child(launch.supervisor_fd, SeatStart)
        start = channel.receive()
        if not isinstance(start, SeatStart):
            raise SystemExit(1)  # the supervisor has died
        return cls(channel, start)

    def tell_view(self, view: View) -> None:
        """The members of the group, for the supervisor and for whoever it starts in this seat next."""
        self._channel.send(ViewChanged(view))

    def tell_done(self) -> None:
        """This rank has done all its work: however the process ends from now on, it is not started again."""
        self._channel.send(Done())

    def begin(self, view: View, beat: Callable[[], Beat], beat_s: float) -> None:
        """Die with the supervisor from now on, and let it see every `beat_s` seconds that this process lives and gets
        on, in `view` if it is a member. What a script does between its steps is its own business."""
        if self.start.rejoin is None:
            self.tell_view(view)
        start_thread("supervisor", die_with_supervisor, self._channel, on_error=end_process)
        start_thread("beat", self._beat, beat, beat_s, on_error=end_process)

    def _beat(self, beat: Callable[[], Beat], beat_s: float) -> None:
        while self._channel.send(beat()):
            time.sleep(beat_s)


def die_with_supervisor(channel: Channel) -> None:
    """Wait for the supervisor's death, and exit."""
    while channel.receive() is not None:
        pass
    os._exit(0)
