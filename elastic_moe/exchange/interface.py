"""TokenExchange: how tokens travel to the slots that compute them, and the results back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Dispatched:
    """What arrived at this rank, grouped by its own slots.

    `rows` [M, D] belong to slot 0, then slot 1, ..., those of a slot run by source, then by pair (t, k);
    `offsets` int32 [S] are the ends of the groups. Rows past `offsets[-1]` are padding: whatever is computed from them
    is ignored. `ticket` is the exchange's own business.
    `expected_rows` is how many rows are likely to count: a hint for whoever computes them, who may not look.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    ticket: Any
    expected_rows: int


class TokenExchange(ABC):
    """One implementation per way of moving tokens. All ranks of a group call the same methods in the same order.

    A slot is one of a member of the group, or -1, which is nobody's: such a pair (t, k) sends nothing and its result is
    zeros, whatever the token holds. A token whose K slots are all -1 does not travel. No other slot may be given, for
    the placement of an epoch uses slots of its members only: an exchange that sees the counts on the host raises
    ValueError, one that never looks sends nothing and leaves the pair's result undefined.

    The interface leaves shapes to the implementation: a collective one returns exactly the rows that came; one of
    fixed shape (capturable in a CUDA graph) returns a full buffer and says by `offsets` what of it counts.
    """

    @abstractmethod
    def dispatch(self, hidden: torch.Tensor, slots: torch.Tensor) -> Dispatched:
        """Send each token to the slots of its K experts. Collective; T may be zero and differ between ranks.

        Args:
            hidden: [T, D] tokens of this rank.
            slots: int64 [T, K] physical slots of members, or -1.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
            ValueError: a slot is neither -1 nor of a member, see the class for who can tell.
        """

    @abstractmethod
    def combine(self, rows: torch.Tensor, ticket: Any) -> torch.Tensor:
        """Return the results to the ranks the tokens came from. Collective.

        Args:
            rows: [M, D] results in the order of `Dispatched.rows`.
            ticket: of the `Dispatched` they answer.

        Returns:
            [T, K, D]: for each token the results of its K experts, in the order of K; zeros for a slot of -1.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """

    def check(self) -> None:  # noqa: B027 - most raise where it happens
        """Whether all calls since the last check have done what they should; once a step, before its results count.

        Raises:
            PeerLost: a peer died, left, or missed the deadline; what the calls returned is garbage.
        """
