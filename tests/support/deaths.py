"""Where a rank dies or lies: traps that a test sets in the code that it runs."""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from elastic_moe.control import recovery
from elastic_moe.control.rebalance import Round
from elastic_moe.control.recovery import Phase, Recovery
from elastic_moe.exchange.collective import CollectiveExchange
from elastic_moe.experts.slots import SlotExperts
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.process_group import Group
from elastic_moe.group.step_barrier import StepBarrier
from elastic_moe.integrations.loading import Loading
from elastic_moe.membership.quorum import Membership
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.weights.checkpoint import CheckpointReader
from elastic_moe.weights.disk import Disk
from elastic_moe.weights.shelf import EngineShelf
from elastic_moe.weights.store import ExpertStore


class Death(NamedTuple):
    """Rank `rank` kills itself in its `life`-th life (0 is the first) when it comes to `point` for the `nth` time; or
    does one of `LIES` all that life."""

    rank: int
    point: str
    nth: int = 1
    life: int = 0


POINTS: Mapping[str, tuple[Any, str]] = {
    "handshake": (ElasticRuntime, "agree"),
    "dispatch": (CollectiveExchange, "dispatch"),
    "all_to_all": (Group, "all_to_all"),
    "experts": (SlotExperts, "forward"),
    "combine": (CollectiveExchange, "combine"),
    "view": (Membership, "next_view"),
    "groups": (EpochGroups, "build"),
    "gather": (Recovery, "_gather"),
    "fill": (recovery, "fill"),
    "commit": (PlacementRegistry, "commit"),
    "load": (Loading, "load"),
    "plan": (Round, "_agree"),
    "stage": (Round, "_stage"),
    "barrier": (StepBarrier, "begin"),
    "swap": (Round, "_publish"),
}
"""Where a rank can die: at the call of these; besides `between` (after a forward), `vote`, and `accept` (of an expert,
once the process has loaded its own)."""
MOVED = [point for point, (owner, name) in POINTS.items() if not hasattr(owner, name)]
assert not MOVED, f"the code of {MOVED} is not where tests lay their traps"

OF_THE_WORK = ("between", "in a replay")
"""Points at which the work itself dies: after a forward; on a GPU, while its kernels run (`gpu/graph_ranks.py`)."""

BUG = "bug in a thread"
"""Another `point`: the thread that gives weights to newcomers raises, and the rank is to end by itself."""

LIES = ("gives wrong weights", "loads wrong bytes", "has a bad disk")
"""What a rank can do instead of dying, as the `point` of a `Death`: to newcomers, from disk at its start, from disk
later."""


def die() -> None:
    """As a rank dies whose GPU does."""
    os.kill(os.getpid(), signal.SIGKILL)


def set_trap(death: Death) -> None:
    """Make this process die there."""
    if death.point in LIES:
        lie(death.point)
        return
    calls = 0

    def trap() -> None:
        nonlocal calls
        calls += 1
        if calls == death.nth:
            die()

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            trap()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    if death.point == "vote":
        enter = Recovery._enter

        def wrapped_enter(self: Recovery, phase: Phase | None) -> None:
            if phase is Phase.COMMIT:
                trap()
            enter(self, phase)

        Recovery._enter = wrapped_enter
    elif death.point == BUG:
        EngineShelf.expert = lambda *_: 1 // 0  # pyright: ignore[reportAttributeAccessIssue]
    elif death.point == "accept":
        once_loaded(lambda _disk: wrap(ExpertStore, "accept"))
    elif death.point not in OF_THE_WORK:
        wrap(*POINTS[death.point])


def once_loaded(act: Callable[[Disk], None]) -> None:
    """Have `act` called with the disk of this process when it has loaded its experts."""
    hold = ElasticRuntime.hold

    def hold_and_act(self: ElasticRuntime, store: ExpertStore, disk: Disk, *more: Any) -> None:
        hold(self, store, disk, *more)
        act(disk)

    ElasticRuntime.hold = hold_and_act  # pyright: ignore[reportAttributeAccessIssue]


def lie(how: str) -> None:
    """Flip a bit of every expert that passes this way."""

    def flip(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1).view(torch.uint8)[5] ^= 16
        return tensor

    if how == "gives wrong weights":
        right = EngineShelf._gift
        EngineShelf._gift = lambda self, tensors, known: right(self, [flip(t.clone()) for t in tensors], known)
    elif how == "has a bad disk":

        def go_bad(disk: Disk) -> None:
            read = disk.read

            def read_wrong(layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
                num_bytes = read(layer, expert, out)
                flip(out[0])
                return num_bytes

            disk.read = read_wrong

        once_loaded(go_bad)
    else:
        read = CheckpointReader.read_expert

        def read_wrong(self: CheckpointReader, module: str, expert: int, out: Sequence[torch.Tensor]) -> int:
            num_bytes = read(self, module, expert, out)
            flip(out[0])
            return num_bytes

        CheckpointReader.read_expert = read_wrong
