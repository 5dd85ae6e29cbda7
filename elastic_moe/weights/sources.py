"""Where an expert's bytes come from: one chain of sources, one rule of verification, one account.

    wants -> `fill` -> source -> landing (a slot, or staging) -> verified -> counted
                         `-> the next source, for what did not come or came wrong

Start, rejoin, loss and rebalance all come here. A new way to have weights is one more `Source`, and its `Origin`.
"""

import enum
import logging
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from elastic_moe.errors import DigestMismatch, PeerLost, TransferFailed

log = logging.getLogger(__name__)


class Origin(enum.StrEnum):
    """Where bytes were before. `fill` asks its sources in this order, nearest first: no other place knows it."""

    MEMORY = "memory"
    """Tensors that this process holds outside of slots."""
    OWN = "own"
    """Another slot of this rank."""
    NODE = "node"
    """A live replica on a rank of this node."""
    REMOTE = "remote"
    """A live replica on another node."""
    DRAM = "dram"
    """The backup in this node's memory."""
    REMOTE_DRAM = "remote_dram"
    """The backup in another node's memory."""
    INSTANCE = "instance"
    """Another instance that runs."""
    DISK = "disk"
    """The checkpoint, as this rank reads it."""
    OTHER_DISK = "other_disk"
    """The checkpoint, as another rank reads it."""


ORIGINS = tuple(Origin)


class Want(NamedTuple):
    """Expert `expert` of MoE layer `layer`, for slot `slot` of this rank."""

    layer: int
    expert: int
    slot: int

    def __str__(self) -> str:
        return f"layer {self.layer} expert {self.expert}"


class Came(NamedTuple):
    """The bytes of a want lie in its landing. `digest` is what the source says of them, if it says anything."""

    want: Want
    origin: Origin
    digest: int | None = None


class Missed(NamedTuple):
    """A want that the source does not have, or could not give."""

    want: Want
    why: str


Told = Sequence[Came | Missed]


@dataclass(frozen=True)
class Until:
    """How long a `fill` may go on asking."""

    deadline: float = math.inf
    """On time.monotonic; after it nobody is asked any more, and what has not come is missing."""
    is_cancelled: Callable[[], bool] = lambda: False
    """Whether nobody needs the experts any more. From any thread."""

    @property
    def left_s(self) -> float:
        """Seconds to the deadline, 0 or more."""
        return max(0.0, self.deadline - time.monotonic())


class Landing(ABC):
    """Where wanted experts are written, verified, and counted as held."""

    @abstractmethod
    def open(self, want: Want) -> Sequence[torch.Tensor]:
        """The tensors to overwrite, in the order of the layout. From here on nobody counts on what they held."""

    @abstractmethod
    def accept(self, came: Sequence[Came]) -> list[bool]:
        """Verify what was written, and hold it. Each digest must be the group's if that is known, else the one that the
        source has said; without either these bytes become the truth. False: it is another one."""

    @abstractmethod
    def has(self, want: Want) -> bool:
        """Whether it was accepted."""

    @abstractmethod
    def num_bytes(self, want: Want) -> int:
        """Of the expert, as it is in memory."""


class Asked(enum.Enum):
    """When a source is asked."""

    IF_LACKING = "while this rank lacks an expert"
    TOGETHER = "by all ranks of a group, whether they lack anything or not"
    IF_ANY_LACKS = "by all ranks of a group, while one of them lacks an expert"


class Source(ABC):
    """One place that experts come from."""

    nearest: Origin
    """Its place in the chain: the nearest origin that it names."""
    asked = Asked.IF_LACKING

    @abstractmethod
    def fetch(self, wants: Sequence[Want], landing: Landing, until: Until) -> Iterator[Told]:
        """Write wanted experts into `landing.open(want)`, and tell of each as soon as its bytes are there: of all that
        are at that moment, for they are verified together.

        What is never told of is missing. A source that all ranks ask together runs to its end, whatever comes.

        Args:
            wants: what is still lacking; may be empty for a source that is asked together.
            landing: where to.
            until: bounds of every wait on somebody else.

        Raises:
            PeerLost: of a source that is asked together: a peer died, left, or missed the deadline.
        """


@dataclass
class Account:
    """What came from where, of one rank. Added to while it is under way; other threads may look."""

    num_bytes: Counter[Origin] = field(default_factory=Counter)
    """Accepted, as they are in memory."""
    rejected: int = 0
    """Copies refused because their digest was wrong."""
    on_progress: Callable[[], None] = lambda: None
    """Called with every expert that was accepted."""

    def add(self, origin: Origin, num_bytes: int) -> None:
        """An expert was accepted."""
        self.num_bytes[origin] += num_bytes
        self.on_progress()

    def __str__(self) -> str:
        came = [f"{n / 1e6:.1f} MB from {origin}" for origin in ORIGINS if (n := self.num_bytes[origin])]
        return ", ".join([*came, *([f"{self.rejected} copies refused"] if self.rejected else [])]) or "nothing"


def fill(
    wants: Iterable[Want],
    landing: Landing,
    sources: Iterable[Source],
    account: Account,
    *,
    until: Until | None = None,
    any_lacks: Callable[[bool], bool] = lambda lacking: lacking,
) -> None:
    """Have every want in `landing`, verified, from the nearest source that has it right.

    Args:
        wants: of this rank.
        landing: where to.
        sources: in any order.
        account: added to.
        until: see `Until`; endless by default.
        any_lacks: told whether this rank lacks an expert, whether any rank does: of the group that fills together.

    Raises:
        TransferFailed: an expert could be had from no source, here or, with `any_lacks`, on another rank;
            `DigestMismatch`: the last source that had it has other bytes than the group.
        PeerLost: cancelled; or a peer died, left, or missed the deadline.
    """
    until = until or Until()
    left: dict[Want, list[str]] = {want: [] for want in wants}
    refused: set[Want] = set()
    for source in sorted(sources, key=lambda source: ORIGINS.index(source.nearest)):
        if source.asked is Asked.IF_ANY_LACKS and not any_lacks(bool(left)):
            return
        if source.asked is Asked.IF_LACKING and (not left or _is_over(until)):
            continue
        for told in source.fetch(tuple(left), landing, until):
            for want, why in (one for one in told if isinstance(one, Missed)):
                left[want].append(f"{source.nearest}: {why}")
                refused.discard(want)
            came = [one for one in told if isinstance(one, Came)]
            for (want, origin, _), right in zip(came, landing.accept(came), strict=True):
                if right:
                    left.pop(want)
                    account.add(origin, landing.num_bytes(want))
                    continue
                account.rejected += 1
                left[want].append(f"{origin}: the bytes have another digest than the group's")
                refused.add(want)
                log.warning("%s: %s", want, left[want][-1])
            if source.asked is Asked.IF_LACKING and _is_over(until):
                break
    if any_lacks(bool(left)):
        raise _failure(left, refused)


def _is_over(until: Until) -> bool:
    if until.is_cancelled():
        raise PeerLost("the epoch was left while experts were read")
    return not until.left_s


def _failure(left: dict[Want, list[str]], refused: set[Want]) -> TransferFailed:
    """Of the first want, in words; what it says is the same for many."""
    if not left:
        return TransferFailed("another rank can have an expert from no source")
    want, reasons = next(iter(left.items()))
    more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    kind = DigestMismatch if want in refused else TransferFailed
    return kind(f"{want}: no source has it right: {'; '.join(reasons) or 'none was asked, or in time'}{more}")
