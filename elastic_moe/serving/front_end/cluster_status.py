"""What a front end knows of the cluster at one moment: the answer of /elastic/status, and the gauges of /metrics."""

from collections.abc import Sequence

import msgspec

from elastic_moe.group.view import Member
from elastic_moe.serving.protocol import Phase, Status


class MemberStatus(msgspec.Struct, frozen=True):
    """One rank: its seat, and its own latest report (zeros before the first; see `protocol.Status`)."""

    rank: int
    node: int
    pid: int
    incarnation: str
    host: str
    phase: Phase
    running: int = 0
    waiting: int = 0
    steps: int = 0
    tokens_generated: int = 0
    memory_bytes: int = 0
    load_seconds: float = 0.0
    placement_version: int = 0
    placement_hash: str = ""
    num_experts: int = 0
    slots: list[list[int]] = []
    cuda_graphs: int = 0

    @classmethod
    def of(cls, member: Member, report: Status | None, phase: Phase) -> "MemberStatus":
        """Join a member, its latest report if there is one, and its phase as seen from here."""
        reported = {} if report is None else msgspec.structs.asdict(report)
        return msgspec.convert(msgspec.structs.asdict(member) | reported | {"phase": phase}, cls)


class PlacementStatus(msgspec.Struct, frozen=True):
    """The newest placement that a rank reports."""

    version: int
    hash: str


class RequestStatus(msgspec.Struct, frozen=True):
    """Requests of this front end: given to a rank, and waiting for a healthy one."""

    running: int
    waiting: int


class ClusterStatus(msgspec.Struct, frozen=True):
    """The cluster as one front end sees it."""

    phase: Phase
    """UNAVAILABLE when no rank can be given requests."""
    reason: str
    """Why the phase is not `serving`, in one line."""
    epoch: int
    node: int
    """The node this front end runs on."""
    placement: PlacementStatus
    requests: RequestStatus
    members: tuple[MemberStatus, ...]


def newest_placement(members: Sequence[MemberStatus]) -> PlacementStatus:
    """The placement with the highest version; version 0 while nobody has reported one."""
    newest = max(members, key=lambda m: m.placement_version, default=None)
    return PlacementStatus(newest.placement_version, newest.placement_hash) if newest else PlacementStatus(0, "")
