"""Who is in the group: `Member` is one process in one seat, `View` the members all have agreed on."""

import hashlib
from collections.abc import Iterable
from itertools import pairwise

import msgspec


class Backup(msgspec.Struct, frozen=True):
    """Where a node's backup of experts is found, in all lives of its daemon."""

    node: int
    address: str
    """ZMQ endpoint of the daemon."""
    segment: str
    """Where processes of the node open the memory."""


class Member(msgspec.Struct, frozen=True):
    """One engine process.

    `rank` is its EP rank: the number of a stable seat, never re-dealt, so ranks may have holes.
    `incarnation` names the process in that seat, see `incarnation_of`; a respawned rank has a new one.
    """

    rank: int
    node: int
    incarnation: str
    pid: int
    host: str
    signals: str
    """ZMQ endpoint for signals between members, for example `tcp://127.0.0.1:40123`."""
    store: str
    """`host:port` of the `StoreServer` this member offers for building groups."""
    address: str = ""
    """ZMQ endpoint for front ends, of a member that serves requests."""
    weights: str = ""
    """ZMQ endpoint from which a newcomer takes weights."""
    lighthouse: str = ""
    """URL of the lighthouse that runs beside this member, if one does."""
    backup: Backup | None = None
    """Its node's backup of experts, of the member beside which that runs."""
    settings: str = ""
    """Digest of what all members must have alike."""


def incarnation_of(proof: str) -> str:
    """The name of a process whose `proof` only its supervisor keeps, and says when that process has died: nobody who
    knows the name can say so."""
    return hashlib.sha256(proof.encode()).hexdigest()[:16]


def backups_of(members: Iterable[Member], known: Iterable[Backup] = ()) -> tuple[Backup, ...]:
    """Those that members announce, and those that were `known` before; one a node."""
    found = {backup.node: backup for backup in (*known, *(m.backup for m in members if m.backup))}
    return tuple(found[node] for node in sorted(found))


class View(msgspec.Struct, frozen=True):
    """The members of one epoch, sorted by rank. Every collective of the epoch has exactly these ranks."""

    epoch: int
    members: tuple[Member, ...]
    lighthouses: tuple[str, ...] = ()
    """URLs of all lighthouses ever announced, the first that answers is used: one outlives the member beside it."""
    backups: tuple[Backup, ...] = ()
    """All ever announced: they outlive members, too."""

    def __post_init__(self) -> None:
        ranks = self.ranks
        if not ranks or any(b <= a for a, b in pairwise(ranks)):
            raise ValueError(f"a view needs members in rising order of rank, got ranks {ranks}")

    @property
    def ranks(self) -> tuple[int, ...]:
        """EP ranks of the members, rising."""
        return tuple(m.rank for m in self.members)

    @property
    def digest(self) -> str:
        """Names these very processes: two views with the same epoch number differ in it."""
        return hashlib.sha256("".join(m.incarnation for m in self.members).encode()).hexdigest()[:12]

    def has(self, rank: int, incarnation: str) -> bool:
        """Whether this very process is a member."""
        return any((m.rank, m.incarnation) == (rank, incarnation) for m in self.members)

    def group_rank(self, rank: int) -> int:
        """Position of EP rank `rank` in this view's groups.

        Raises:
            ValueError: the rank is not a member.
        """
        return self.ranks.index(rank)

    def member(self, rank: int) -> Member:
        """The member in seat `rank`.

        Raises:
            ValueError: the rank is not a member.
        """
        return self.members[self.group_rank(rank)]
