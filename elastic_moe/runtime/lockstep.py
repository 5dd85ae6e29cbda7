"""What the loop of a rank does that has no engine around it: come back after a loss, wait for the others at the end."""

import logging
import time
from typing import Protocol

from elastic_moe.errors import PeerLost
from elastic_moe.group.view import View

log = logging.getLogger(__name__)

FINISH_POLL_S = 0.05


class Rank(Protocol):
    """What the loop asks of `ElasticRuntime`."""

    @property
    def view(self) -> View: ...  # noqa: D102 - see there
    def agree(self, *flags: int) -> list[int]: ...  # noqa: D102
    def join_idle(self) -> None: ...  # noqa: D102
    def recover(self, reason: str) -> object: ...  # noqa: D102


def others_run(rank: Rank, num_ranks: int) -> bool:
    """Take part in what the others run now. False: no rank of the whole launch, `num_ranks`, has anything left."""
    try:
        (busy,) = rank.agree(0)
        if busy:
            rank.join_idle()
        elif len(rank.view.members) == num_ranks:
            return False
        else:
            time.sleep(FINISH_POLL_S)
    except PeerLost as error:
        come_back(rank, str(error))
    return True


def come_back(rank: Rank, reason: str) -> None:
    """Recover, however long it takes until the members agree."""
    while True:
        try:
            rank.recover(reason)
        except PeerLost as error:
            log.error("%s; trying on", error)  # noqa: TRY400 - expected, and told in one line
        else:
            return
