"""Vote: all ranks of a group tell whether they lack an expert, and with the same word what came to them from where."""

from collections.abc import Callable

import numpy as np

from elastic_moe.group.process_group import Group
from elastic_moe.weights.sources import ORIGINS, Account


class Vote:
    """The `any_lacks` of a `fill` that a group does together."""

    def __init__(self, group: Group, account: Account, before: Callable[[], None] = lambda: None) -> None:
        """`account` is this rank's; `before` is called before each vote."""
        self._group = group
        self._account = account
        self._before = before
        self.num_bytes: dict[str, int] = {}
        """Bytes that came to all ranks, by origin, of the last vote."""

    def __call__(self, lacking: bool) -> bool:
        """Whether any rank lacks an expert. Collective.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        self._before()
        mine = np.array([int(lacking), *(self._account.num_bytes[origin] for origin in ORIGINS)])
        lack, *num_bytes = self._group.all_reduce_sum_array(mine).tolist()
        self.num_bytes = {str(origin): n for origin, n in zip(ORIGINS, num_bytes, strict=True) if n}
        return lack > 0
