"""Ranks that die where a test says, and the supervisor that starts them again: a test's own process.

Every rank runs the same work in forked processes (`harness` has torch loaded in the fork server): `STEPS` forwards of
a tiny model, each on tokens of its own, each result to a file, so that a rank that died goes on after its last one.
"""

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
import torch
import torch.distributed as dist
from torchft.coordination import LighthouseServer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from elastic_moe.config import EplbConfig
from elastic_moe.control import recovery
from elastic_moe.control.rebalance import Round
from elastic_moe.control.recovery import Phase, Recovery
from elastic_moe.deadlines import Deadlines
from elastic_moe.exchange.collective import CollectiveExchange
from elastic_moe.experts.slots import SlotExperts
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.process_group import Group
from elastic_moe.group.step_barrier import StepBarrier
from elastic_moe.group.view import View
from elastic_moe.integrations import transformers as integration
from elastic_moe.integrations.transformers import elasticize, meta_model
from elastic_moe.membership.launch import Launch, SeatStart
from elastic_moe.membership.quorum import Membership
from elastic_moe.membership.signals import PeerDied, SignalSender
from elastic_moe.placement.placement import EMPTY
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.supervision.lighthouse import TICK_MS
from elastic_moe.supervision.ports import lasting_port
from elastic_moe.weights import peers
from elastic_moe.weights.checkpoint import CheckpointReader
from elastic_moe.weights.digest import digest
from elastic_moe.weights.disk import Disk
from elastic_moe.weights.store import ExpertStore
from support.harness import PRELOAD

STEPS = 5
RESPAWN_S = 0.75
"""From a death to the next life: survivors recover first, as with a real supervisor. At the start of a launch they wait
`Deadlines.settle_s` before they ask."""
WORLD = 4
DEADLINE_S = 60.0
STEPS_OF_A_ROUND = 100
"""More than a round takes, in forwards of the tiny model."""


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
    "load": (integration, "_load"),
    "plan": (Round, "_agree"),
    "stage": (Round, "_stage"),
    "barrier": (StepBarrier, "begin"),
    "swap": (Round, "_publish"),
}
"""Where a rank can die: at the call of these; besides `between` (after a forward), `vote`, and `accept` (of an expert,
once the process has loaded its own)."""

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
        peers._copy_of = lambda *_: 1 // 0  # pyright: ignore[reportAttributeAccessIssue]
    elif death.point == "accept":
        once_loaded(lambda disk: wrap(ExpertStore, "accept"))
    elif death.point not in OF_THE_WORK:
        wrap(*POINTS[death.point])


def once_loaded(act: Callable[[Disk], None]) -> None:
    """Have `act` called with the disk of this process when it has loaded its experts."""
    hold = ElasticRuntime.hold

    def hold_and_act(self: ElasticRuntime, store: ExpertStore, disk: Disk, dense: Any) -> None:
        hold(self, store, disk, dense)
        act(disk)

    ElasticRuntime.hold = hold_and_act  # pyright: ignore[reportAttributeAccessIssue]


def lie(how: str) -> None:
    """Flip a bit of every expert that passes this way."""

    def flip(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1).view(torch.uint8)[5] ^= 16
        return tensor

    if how == "gives wrong weights":
        right = peers._bytes_of
        peers._bytes_of = lambda tensor: right(flip(tensor.clone()))
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


def make_checkpoint(folder: Path) -> Path:
    """A tiny random Qwen3-MoE: 2 layers, 8 experts."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def tokens_of(rank: int, step: int) -> torch.Tensor:
    """The input of one rank's one step."""
    return torch.randint(64, (1, 7), generator=torch.Generator().manual_seed(100 * rank + step))


def wanted(checkpoint: Path) -> dict[tuple[int, int], torch.Tensor]:
    """The logits of every rank's every step, from one process."""
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        return {(r, s): model(tokens_of(r, s)).logits for r in range(WORLD) for s in range(STEPS)}


def run_cluster(
    folder: Path,
    checkpoint: Path,
    deaths: Sequence[Death],
    redundant_slots: int = 0,
    deadline_s: float = DEADLINE_S,
    rounds: int = 0,
    respawn_s: float = RESPAWN_S,
    work: Callable[..., None] | None = None,
) -> tuple[dict[tuple[int, int], torch.Tensor], list[dict[str, Any]]]:
    """Run the work on `WORLD` ranks that die as told, each started again. The logits, and each rank's last word.

    Between the steps the load balancer ends `rounds` rounds, under forwards whose results nobody keeps. `work` is what
    a rank does instead of `_work`, with the same arguments and the same files in the end.
    """
    deadlines = Deadlines.of(WORLD)
    lighthouse = LighthouseServer(
        bind="127.0.0.1:0",
        min_replicas=1,
        join_timeout_ms=int(deadlines.lighthouse_wait_s * 1000),
        quorum_tick_ms=TICK_MS,
        heartbeat_timeout_ms=int(deadlines.heartbeat_timeout_s * 1000),
    )
    url = f"http://127.0.0.1:{lighthouse.address().rsplit(':', 1)[1]}"
    try:
        args = (folder, checkpoint, tuple(deaths), redundant_slots, rounds)
        return _Seats(work or _work, args, url, respawn_s).run(deadline_s)
    finally:
        lighthouse.shutdown()


class _Seats:
    """The supervisors of all ranks in one."""

    def __init__(self, work: Callable[..., None], args: tuple[Any, ...], lighthouse: str, respawn_s: float) -> None:
        self._work, self._args = work, args
        self._folder, _, deaths, _, _ = args
        self._lighthouse, self._respawn_s = lighthouse, respawn_s
        self._due: dict[int, float] = {}
        self._deaths = sum(death.point not in LIES for death in deaths)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOAD, "support.elastic_harness"])
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._ports = [lasting_port("127.0.0.1") for _ in range(WORLD)]
        self._lives = [0] * WORLD
        self._processes = [self._start(rank, None) for rank in range(WORLD)]
        self._sender = SignalSender()

    def run(self, deadline_s: float) -> tuple[dict[tuple[int, int], torch.Tensor], list[dict[str, Any]]]:
        deadline, over = time.monotonic() + deadline_s, set()
        while len(over) < WORLD and time.monotonic() < deadline:
            alive = {p.sentinel: r for r, p in enumerate(self._processes) if r not in over and r not in self._due}
            for rank in [alive[sentinel] for sentinel in wait(list(alive), timeout=0.05)]:  # pyright: ignore[reportArgumentType]
                process = self._processes[rank]
                process.join()
                if self._was_to_die(rank, process.exitcode) and sum(self._lives) + len(self._due) < self._deaths:
                    self._announce(rank)
                    self._due[rank] = time.monotonic() + self._respawn_s
                else:
                    over.add(rank)
            for rank in [r for r, due in self._due.items() if due <= time.monotonic()]:
                del self._due[rank]
                self._replace(rank)
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            if process.exitcode is None:
                os.kill(process.pid or 0, signal.SIGUSR1)
                process.join(1.0)
                process.kill()
        self._sender.close()
        if codes != [0] * WORLD:
            logs = "\n".join(f"--- rank {r}:\n{(self._folder / f'log-{r}').read_text()[-5000:]}" for r in range(WORLD))
            raise AssertionError(f"ranks ended with {codes} after lives {self._lives}\n{logs}")
        assert sum(self._lives) == self._deaths, f"lives {self._lives}: not every death came"
        logits = {(r, s): torch.load(result_path(self._folder, r, s)) for r in range(WORLD) for s in range(STEPS)}
        return logits, [torch.load(self._folder / f"end-{r}", weights_only=False) for r in range(WORLD)]

    def _start(self, rank: int, rejoin: View | None) -> Any:
        launch = Launch(rank, WORLD, rank, WORLD, 0, f"127.0.0.1:{self._store.port}")
        start = SeatStart(launch, self._lighthouse if rank == 0 else "", self._ports[rank], rejoin)
        process = self._context.Process(
            target=self._work, args=(msgspec.json.encode(start), self._lives[rank], *self._args)
        )
        process.daemon = True
        process.start()
        return process

    def _was_to_die(self, rank: int, code: int | None) -> bool:
        by_bug = any((d.rank, d.life, d.point) == (rank, self._lives[rank], BUG) for d in self._args[2])
        return code == -signal.SIGKILL or (by_bug and code != 0)

    def _views(self) -> list[View]:
        """Those that the ranks have told, oldest first."""
        views = [msgspec.json.decode(path.read_bytes(), type=View) for path in self._folder.glob("view-*")]
        return sorted(views, key=lambda view: view.epoch)

    def _announce(self, rank: int) -> None:
        views = self._views()
        for known in views:  # a process that died before it told its view is in somebody's
            for dead in [m for m in known.members if m.rank == rank]:
                others = [m.signals for m in views[-1].members if m.rank != rank]
                self._sender.tell(others, PeerDied(dead.rank, dead.incarnation))

    def _replace(self, rank: int) -> None:
        self._lives[rank] += 1
        self._processes[rank] = self._start(rank, self._views()[-1])


def result_path(folder: Path, rank: int, step: int) -> Path:
    return folder / f"logits-{rank}-{step}"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Whole or not at all."""
    write(part := path.with_name(f"part-{path.name}"))
    part.rename(path)


def rebalance(runtime: ElasticRuntime, forward: Callable[[], Any]) -> bool:
    """Have the balancer end a round, at steps that do `forward`; whether it has moved anything. A loss may cost it: its
    request is answered in the next epoch, after some seconds, for which nobody waits."""
    runtime.pool.balancer.request()
    reports = runtime.pool.balancer.reports
    for _ in range(STEPS_OF_A_ROUND):
        runtime.run(forward)
        if not reports.empty():
            return reports.get().outcome == "moved"
    return False


def usage_of(process: psutil.Process) -> tuple[float, int, int, int]:
    """The time, and bytes of memory, file descriptors, threads."""
    return time.monotonic(), process.memory_info().rss, process.num_fds(), process.num_threads()


def begin_life(start: bytes, life: int, folder: Path, deaths: Sequence[Death]) -> tuple[SeatStart, list[Death]]:
    """Who this process is, and what deaths it has to die, its traps set; what it says goes to a file."""
    seat = msgspec.json.decode(start, type=SeatStart)
    log = os.open(folder / f"log-{seat.launch.rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level="DEBUG", stream=sys.stderr, format=f"%(asctime)s life {life} %(name)s %(message)s")
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    torch.set_num_threads(1)
    mine = [death for death in deaths if (death.rank, death.life) == (seat.launch.rank, life)]
    for death in mine:
        set_trap(death)
    return seat, mine


def tell_views(runtime: ElasticRuntime, folder: Path, seen: Callable[[], object]) -> None:
    """Write each view for the supervisor, after `seen`, the first one now if there is one."""

    def tell(view: View) -> None:
        seen()
        write_whole(folder / f"view-{runtime.rank}", lambda part: part.write_bytes(msgspec.json.encode(view)))

    if runtime.view.has(runtime.rank, runtime.seat.member.incarnation):
        tell(runtime.view)
    runtime.on_view.append(tell)


def end_life(runtime: ElasticRuntime, folder: Path, **more: Any) -> None:
    """Wait for the others, write the last word, and be gone."""
    runtime.finish()
    store = runtime.pool.store
    end = {
        "placement": (runtime.pool.placement.version, runtime.pool.placement.hash),
        "slots": runtime.pool.placement.slots,
        "held": store.held,
        "digests": store.digests,
        "wrong": [
            (int(layer), int(slot))
            for layer, slot in np.argwhere(store.held != EMPTY)
            if digest(store.tensors(layer, slot)) != store.digests[layer, store.held[layer, slot]]
        ],
        "epoch": runtime.view.epoch,
        "loaded": dict(runtime.pool.loaded.num_bytes),
    }
    torch.save(end | more, folder / f"end-{runtime.rank}")
    os._exit(0)


def _work(
    start: bytes, life: int, folder: Path, checkpoint: Path, deaths: Sequence[Death], redundant_slots: int, rounds: int
) -> None:
    seat, mine = begin_life(start, life, folder, deaths)
    rank = seat.launch.rank
    eplb = EplbConfig(mode="async" if rounds else "off", half_life_steps=2, interval_s=0.2, mb_per_step=0.001)
    runtime = ElasticRuntime.join(seat, device=torch.device("cpu"), exchange_timeout_s=30, eplb=eplb)

    process, usage, moved = psutil.Process(), [], 0

    tell_views(runtime, folder, lambda: usage.append(usage_of(process)))
    model = elasticize(
        meta_model(checkpoint, torch.float32), runtime, checkpoint=checkpoint, redundant_slots=redundant_slots
    )
    with torch.inference_mode():
        for step in range(STEPS):
            if not result_path(folder, rank, step).exists():
                logits = runtime.run(lambda step=step: model(tokens_of(rank, step)).logits)
                if any(death.point == "between" and death.nth == step for death in mine):
                    die()
                write_whole(result_path(folder, rank, step), lambda part, logits=logits: torch.save(logits, part))
            for number in range(rounds):
                moved += rebalance(runtime, lambda at=step * rounds + number: model(tokens_of(rank, STEPS + at)))
                usage.append(usage_of(process))
    end_life(runtime, folder, usage=usage, moved=moved)
