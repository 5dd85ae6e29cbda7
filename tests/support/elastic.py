"""Ranks that die where a test says, and the supervisor that starts them again: a test's own process.

Every rank runs the same work: `STEPS` forwards of a tiny model, each on tokens of its own, each result to a file, so
that a rank that died goes on after its last one.
"""

import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import torch
from torchft.coordination import LighthouseServer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from elastic_moe.config import EplbConfig
from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import View, incarnation_of
from elastic_moe.integrations.transformers import elasticize, meta_model
from elastic_moe.membership.launch import SeatStart
from elastic_moe.membership.signals import PeerDied, SignalSender
from elastic_moe.placement.placement import EMPTY
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.supervision.lighthouse import TICK_MS
from elastic_moe.supervision.ports import lasting_port
from elastic_moe.weights.digest import digest
from support.deaths import BUG, LIES, Death, die, set_trap
from support.ranks import Ranks, write_whole

STEPS = 5
RESPAWN_S = 0.75
"""From a death to the next life: survivors recover first, as with a real supervisor. At the start of a launch they wait
`Deadlines.settle_s` before they ask."""
WORLD = 4
DEADLINE_S = 60.0
STEPS_OF_A_ROUND = 100
"""More than a round takes, in forwards of the tiny model."""


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
        with Ranks(folder, WORLD, preload=["support.elastic"]) as ranks:
            _Seats(ranks, work or _work, args, url, respawn_s).run(deadline_s)
            logits = {(r, s): torch.load(result_path(folder, r, s)) for r in range(WORLD) for s in range(STEPS)}
            return logits, [torch.load(folder / f"end-{r}", weights_only=False) for r in range(WORLD)]
    finally:
        lighthouse.shutdown()


class _Seats:
    """The supervisors of all ranks in one: every life ends as its deaths say, and is followed by the next."""

    def __init__(
        self, ranks: Ranks, work: Callable[..., None], args: tuple[Any, ...], lighthouse: str, respawn_s: float
    ) -> None:
        self._ranks, self._work, self._args = ranks, work, args
        self._folder, _, deaths, _, _ = args
        self._lighthouse, self._respawn_s = lighthouse, respawn_s
        self._deadly = [death for death in deaths if death.point not in LIES]
        self._due: dict[int, float] = {}
        self._lives = [0] * WORLD
        self._proofs = [""] * WORLD
        self._ports = [lasting_port("127.0.0.1") for _ in range(WORLD)]
        self._sender = SignalSender()
        for rank in range(WORLD):
            self._start(rank, None)

    def run(self, deadline_s: float) -> None:
        """Until every rank's last life is over; AssertionError when one ends in another way, or not in time."""
        deadline, codes = time.monotonic() + deadline_s, {}
        while len(codes) < WORLD and time.monotonic() < deadline:
            for rank, code in self._ranks.wait(timeout_s=0.05).items():
                if self._dies(rank, code):
                    self._announce(rank)
                    self._due[rank] = time.monotonic() + self._respawn_s
                else:
                    codes[rank] = code
            for rank in [r for r, due in self._due.items() if due <= time.monotonic()]:
                del self._due[rank]
                self._lives[rank] += 1
                self._start(rank, self._views()[-1])
        self._ranks.kill()
        self._sender.close()
        assert codes == dict.fromkeys(range(WORLD), 0), f"ranks ended with {codes} after lives {self._lives}"
        assert sum(self._lives) == len(self._deadly), f"lives {self._lives}: not every death came"

    def _dies(self, rank: int, code: int) -> bool:
        """Whether this life ended by a death that it was told."""
        points = {death.point for death in self._deadly if (death.rank, death.life) == (rank, self._lives[rank])}
        return code != 0 if BUG in points else bool(points) and code == -signal.SIGKILL

    def _start(self, rank: int, rejoin: View | None) -> None:
        lighthouse = self._lighthouse if rank == 0 else ""
        self._proofs[rank] = proof = f"life {self._lives[rank]} of rank {rank} in {self._folder}"
        start = SeatStart(
            self._ranks.launch(rank),
            lighthouse=lighthouse,
            signals_port=self._ports[rank],
            incarnation=incarnation_of(proof),
            rejoin=rejoin,
        )
        self._ranks.start(rank, self._work, msgspec.json.encode(start), self._lives[rank], *self._args)

    def _views(self) -> list[View]:
        """Those that the ranks have told, oldest first."""
        views = [msgspec.json.decode(path.read_bytes(), type=View) for path in self._folder.glob("view-*")]
        return sorted(views, key=lambda view: view.epoch)

    def _announce(self, rank: int) -> None:
        members = self._views()[-1].members
        self._sender.tell([m.signals for m in members if m.rank != rank], PeerDied(rank, self._proofs[rank]))


def result_path(folder: Path, rank: int, step: int) -> Path:
    return folder / f"logits-{rank}-{step}"


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


def begin_life(start: bytes, life: int, deaths: Sequence[Death]) -> tuple[SeatStart, list[Death]]:
    """Who this process is, and what deaths it has to die, its traps set."""
    seat = msgspec.json.decode(start, type=SeatStart)
    logging.basicConfig(level="DEBUG", stream=sys.stderr, format=f"%(asctime)s life {life} %(name)s %(message)s")
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
    """Wait for the others, and write the last word."""
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


def _work(
    start: bytes, life: int, folder: Path, checkpoint: Path, deaths: Sequence[Death], redundant_slots: int, rounds: int
) -> None:
    seat, mine = begin_life(start, life, deaths)
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
