"""A process's place: what torchrun tells it of the launch, and its supervisor of the seat."""

import socket
from collections.abc import Mapping

import msgspec

from elastic_moe.group.view import Backup, View
from elastic_moe.placement.topology import Topology
from elastic_moe.secret import launch_secret
from elastic_moe.wire import Wire

SUPERVISOR_FD = "ELASTIC_MOE_SUPERVISOR_FD"


class Launch(msgspec.Struct, frozen=True):
    """One process's place among the ranks that torchrun started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    store: str = ""
    """`host:port` of the launch's TCPStore; empty for a lone process."""
    store_is_up: bool = True
    """Whether torchrun's agent keeps that store; if not, rank 0 must."""
    run: str = ""
    """torchrun's name of the launch: its store may be shared with others."""
    supervisor_fd: int | None = None
    """The line to the supervisor of this process, if `elastic_moe.supervise` has started it."""
    wire: Wire = Wire()
    """What all processes of the launch know and no stranger does."""

    @property
    def topology(self) -> Topology:
        """The seats: torchrun deals its ranks in order, the same number to each node."""
        return Topology.uniform(self.world_size, self.local_world_size)

    @classmethod
    def from_torchrun(cls, environ: Mapping[str, str]) -> "Launch":
        """From the environment torchrun gives its processes; a lone process without it is rank 0 of 1. Its secret is
        `launch_secret`'s.

        Raises:
            ValueError: the environment has only a part of torchrun's variables, no real port, or a short secret.
        """
        supervisor_fd = int(environ[SUPERVISOR_FD]) if SUPERVISOR_FD in environ else None
        if "RANK" not in environ:
            return cls(supervisor_fd=supervisor_fd, wire=Wire(launch_secret(environ)))
        if environ.get("MASTER_PORT") == "0":
            raise ValueError("torchrun --master-port 0 tells its ranks no port: give one, or --standalone on one node")
        try:
            return cls(
                rank=int(environ["RANK"]),
                world_size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ["LOCAL_RANK"]),
                local_world_size=int(environ["LOCAL_WORLD_SIZE"]),
                node=int(environ["GROUP_RANK"]),
                store=f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}",
                store_is_up=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                run=environ.get("TORCHELASTIC_RUN_ID", ""),
                supervisor_fd=supervisor_fd,
                wire=Wire(launch_secret(environ)),
            )
        except KeyError as missing:
            raise ValueError(f"RANK is set but {missing} is not: start with torchrun, or with neither") from None


class SeatStart(msgspec.Struct, tag="seat", frozen=True):
    """Supervisor -> the process of a rank, first of all: who you are."""

    launch: Launch
    lighthouse: str = ""
    """URL of the lighthouse on this node, for the rank that announces it."""
    backup: Backup | None = None
    """The backup on this node, for the rank that announces it."""
    signals_port: int = 0
    """Where to hear the signals of members: the same in all lives of a seat, so that a rank that was lost can still ask
    to join when all whom it knew have died."""
    incarnation: str = ""
    """The name of the process; it makes its own if it has no supervisor."""
    rejoin: View | None = None
    """The last view known, for a process that takes the seat of one that died; None at the first start."""


def host_of(launch: Launch) -> str:
    """The address under which the peers of this launch reach this host: of one node, none that others reach."""
    if launch.world_size == launch.local_world_size:
        return "127.0.0.1"
    return reachable_host(launch.store.rpartition(":")[0])


def reachable_host(peer: str) -> str:
    """This host's address on the way to `peer` (no packet is sent); loopback stays loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]
