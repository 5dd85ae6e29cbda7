"""The loop around a library user's forwards: all ranks together, and again when a rank is lost."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from elastic_moe.errors import PeerLost

FINISH_POLL_S = 0.05
Result = TypeVar("Result")


class Ranks(Protocol):
    """What the loop needs of `ElasticRuntime`; its methods are documented there."""

    def agree(self, *flags: int) -> list[int]: ...  # noqa: D102
    def step(self) -> AbstractContextManager[None]: ...  # noqa: D102
    def join_idle(self) -> None: ...  # noqa: D102
    def recover(self, reason: str) -> Any: ...  # noqa: D102
    @property
    def is_whole(self) -> bool: ...  # noqa: D102


def run(ranks: Ranks, forward: Callable[[], Result]) -> Result:
    """See `ElasticRuntime.run`."""
    while True:
        try:
            ranks.agree(1)
            with ranks.step():
                return forward()
        except PeerLost as error:
            ranks.recover(str(error))


def help_others(ranks: Ranks) -> None:
    """Take part without tokens until no rank of the whole launch has a forward left. See `ElasticRuntime.finish`."""
    while True:
        try:
            (busy,) = ranks.agree(0)
            if busy:
                ranks.join_idle()
            elif ranks.is_whole:
                return
            else:
                time.sleep(FINISH_POLL_S)
        except PeerLost as error:
            ranks.recover(str(error))
