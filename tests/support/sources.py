"""One rank's store, wants and faults, for tests of where experts come from.

The oracle: an expert's tensors are a formula of (layer, expert), so a byte in the wrong place shows.
"""

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from elastic_moe.errors import CheckpointError
from elastic_moe.placement.placement import EMPTY
from elastic_moe.weights.digest import digest
from elastic_moe.weights.sources import Account, Came, Origin, Source, Until, Want, fill
from elastic_moe.weights.staged import Staged
from elastic_moe.weights.store import ExpertStore

LAYERS, EXPERTS, SLOTS = 2, 4, 2
NUM_BYTES = 6 * 4 + 3 * 2
WANTS = [Want(0, 2, 0), Want(0, 3, 1), Want(1, 2, 0), Want(1, 3, 1)]
"""All of rank 1 of 2, placed in order."""


def tensors_of(layer: int, expert: int) -> list[torch.Tensor]:
    number = 10.0 * layer + expert
    return [torch.arange(6.0) + number, torch.arange(3).bfloat16() - number]


class Layer:
    """What a store needs of SlotExperts."""

    layout = SimpleNamespace(num_experts=EXPERTS, num_bytes=NUM_BYTES)
    num_slots = SLOTS

    def __init__(self) -> None:
        self.first = torch.full((SLOTS, 6), -1.0)
        self.second = torch.full((SLOTS, 3), -1.0).bfloat16()

    def slot_tensors(self, slot: int) -> list[torch.Tensor]:
        return [self.first[slot], self.second[slot]]

    def resize(self, num_slots: int) -> None:
        self.first, self.second = (
            torch.cat([old, old.new_zeros(max(0, num_slots - len(old)), old.shape[1])])[:num_slots]
            for old in (self.first, self.second)
        )


def make_store(held: Sequence[int] = (), *, knows_digests: bool = True) -> ExpertStore:
    """With the experts `held` in its slots, in every layer."""
    layers: Any = [Layer() for _ in range(LAYERS)]
    store = ExpertStore(layers, np.tile(np.array(held or [EMPTY] * SLOTS), (LAYERS, 1)))
    for layer, slot in np.argwhere(store.held != EMPTY).tolist():
        for target, source in zip(store.tensors(layer, slot), tensors_of(layer, int(held[slot])), strict=True):
            target.copy_(source)
    if knows_digests:
        store.digests = np.array([[digest(tensors_of(layer, e)) for e in range(EXPERTS)] for layer in range(LAYERS)])
    return store


def write(layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
    for target, source in zip(out, tensors_of(layer, expert), strict=True):
        target.copy_(source)
    return NUM_BYTES


class Fallback(Source):
    """The end of every chain here: it has everything right, and remembers what it was asked for."""

    nearest = Origin.OTHER_DISK

    def __init__(self) -> None:
        self.asked_for: list[Want] = []

    def fetch(self, wants, landing, until):
        for want in wants:
            self.asked_for.append(want)
            write(want.layer, want.expert, landing.open(want))
            yield [Came(want, Origin.OTHER_DISK)]


class Faulty:
    """`read` of a disk with a fault at the second expert."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.reads = 0

    def __call__(self, layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
        self.reads += 1
        second = (layer, expert) == WANTS[1][:2]
        if self.fault == "some" and second:
            raise CheckpointError("there is no such expert")
        if self.fault == "dies" and self.reads > 1:
            raise OSError("the disk is broken")
        if self.fault == "wrong size" and second:
            raise CheckpointError("it has another shape")
        if self.fault == "late":
            time.sleep(0.05)
        write(layer, expert, out)
        if self.fault == "corrupt" and second:
            out[0][2] += 1
        return NUM_BYTES


class Ran(NamedTuple):
    """What a `fill` from [the source, the fallback] has led to."""

    store: ExpertStore
    account: Account
    fallback: Fallback
    seconds: float


def run(sources: Sequence[Source], landing: Any, store: ExpertStore, until: Until | None, **more: Any) -> Ran:
    account, fallback, begin = Account(), Fallback(), time.monotonic()
    fill(WANTS, landing, [*sources, fallback], account, until=until, **more)
    if isinstance(landing, Staged):
        landing.install()
    return Ran(store, account, fallback, time.monotonic() - begin)
