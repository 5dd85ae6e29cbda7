"""ExpertStore: the experts one rank holds, of all MoE layers, with their digests. The truth about "who has what"."""

from collections.abc import Sequence

import numpy as np
import torch

from elastic_moe.experts.slots import SlotExperts
from elastic_moe.memory.free import free_bytes
from elastic_moe.placement.placement import EMPTY
from elastic_moe.weights.digest import digest, digests
from elastic_moe.weights.sources import Came, Landing, Want

UNKNOWN = -1
"""A digest nobody has computed yet."""


class ExpertStore(Landing):
    """Slots of every layer and what is in them.

    `held` int32 [L, S] is this rank's inventory. A slot is marked empty before its bytes are overwritten and filled
    again only when the new bytes are verified, so a transfer that breaks off never leaves a slot that lies.
    """

    def __init__(self, layers: Sequence[SlotExperts], held: np.ndarray | None = None, *, trains: bool = False) -> None:
        """`held` is what the slots hold already, by default nothing. `trains`: experts change, so that no digest stays
        true."""
        self.layers = list(layers)
        if held is None:
            held = np.full((len(self.layers), self.layers[0].num_slots), EMPTY)
        self.held = np.array(held, dtype=np.int32)
        self.num_experts = self.layers[0].layout.num_experts
        self.digests = np.full((len(self.layers), self.num_experts), UNKNOWN, dtype=np.int64)
        self._trains = trains
        self._next_check = 0

    @property
    def num_slots(self) -> int:
        """S."""
        return self.held.shape[1]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer in memory (of the first layer; they are alike in practice)."""
        return self.layers[0].layout.num_bytes

    def wants(self, goal: np.ndarray) -> list[Want]:
        """What is lacking in order to hold `goal`, int32 [L, S]."""
        lacking = np.argwhere((goal != EMPTY) & (goal != self.held))
        return [Want(layer, int(goal[layer, slot]), slot) for layer, slot in lacking.tolist()]

    def record_digests(self) -> None:
        """Compute the digest of every expert held here that is not known yet; in training, of all."""
        if self._trains:
            self.digests.fill(UNKNOWN)
        for layer, slots in enumerate(self.held):
            unknown = {int(expert): slot for slot, expert in enumerate(slots) if expert != EMPTY}
            unknown = {expert: slot for expert, slot in unknown.items() if self.digests[layer, expert] == UNKNOWN}
            self.digests[layer, list(unknown)] = digests([self.tensors(layer, slot) for slot in unknown.values()])

    def trust(self, digests: np.ndarray) -> int:
        """Take the group's digests, int64 [L, E], for the truth, and give up slots whose bytes have another one.

        Returns the number of slots given up.
        """
        given_up = 0
        for layer, slot in np.argwhere(self.held != EMPTY).tolist():
            expert = self.held[layer, slot]
            if UNKNOWN != digests[layer, expert] != self.digests[layer, expert]:
                self.held[layer, slot] = EMPTY
                given_up += 1
        self.digests = np.where(digests == UNKNOWN, self.digests, digests)
        return given_up

    def room(self) -> int:
        """Slots of every layer that this rank has memory for."""
        of_a_slot = sum(layer.layout.num_bytes for layer in self.layers)
        largest = max(layer.layout.num_bytes for layer in self.layers)
        free = free_bytes(self.tensors(0, 0)[0].device) - largest * self.num_slots  # a layer is copied at a time
        return self.num_slots + max(0, free // of_a_slot)

    def resize(self, num_slots: int) -> None:
        """Have `num_slots` slots in every layer; new ones are empty.

        Raises:
            RuntimeError: there is no memory for so many; all is as before.
        """
        before = self.num_slots
        if num_slots == before:
            return
        try:
            for experts in self.layers:
                experts.resize(num_slots)
        except RuntimeError:  # of torch, on any device
            for experts in self.layers:
                experts.resize(before)
            raise
        more = max(0, num_slots - before)
        self.held = np.pad(self.held, ((0, 0), (0, more)), constant_values=EMPTY)[:, :num_slots]

    def tensors(self, layer: int, slot: int) -> Sequence[torch.Tensor]:
        """Views of the tensors in a slot."""
        return self.layers[layer].slot_tensors(slot)

    def vacate(self, layer: int, slot: int) -> Sequence[torch.Tensor]:
        """Mark a slot empty and return its tensors to be overwritten."""
        self.held[layer, slot] = EMPTY
        return self.tensors(layer, slot)

    def open(self, want: Want) -> Sequence[torch.Tensor]:
        """See `Landing.open`: its slot is empty until `accept`."""
        return self.vacate(want.layer, want.slot)

    def accept(self, came: Sequence[Came]) -> list[bool]:
        """See `Landing.accept`."""
        rights = self.are_right(came, [self.tensors(want.layer, want.slot) for want, *_ in came])
        for (want, *_), right in zip(came, rights, strict=True):
            if right:
                self.held[want.layer, want.slot] = want.expert
        return rights

    def has(self, want: Want) -> bool:
        """See `Landing.has`."""
        return bool(self.held[want.layer, want.slot] == want.expert)

    def num_bytes(self, want: Want) -> int:
        """See `Landing.num_bytes`."""
        return self.layers[want.layer].layout.num_bytes

    def are_right(self, came: Sequence[Came], tensors: Sequence[Sequence[torch.Tensor]]) -> list[bool]:
        """Whether the tensors of each have the digest of the expert: the group's if it is known, else what was said.
        Without either it is theirs from now on."""
        rights = []
        for (want, _, said), found in zip(came, digests(tensors), strict=True):
            known = self.digests[want.layer, want.expert]
            expected = said if known == UNKNOWN else known
            rights.append(expected in (None, found))
            if rights[-1]:
                self.digests[want.layer, want.expert] = found
        return rights

    def install(self, want: Want, tensors: Sequence[torch.Tensor]) -> None:
        """Copy an expert that was verified elsewhere (in staging) into its slot."""
        for target, source in zip(self.open(want), tensors, strict=True):
            target.copy_(source, non_blocking=True)
        self.held[want.layer, want.slot] = want.expert

    def check_integrity(self, placed: np.ndarray) -> None:
        """Whether the slots hold what is placed there, int32 [L, S]; and whether the bytes of one of them, the next at
        each call, still have their digest. For idle time.

        Raises:
            ValueError: they do not.
        """
        if not np.array_equal(self.held, placed):
            layer, slot = np.argwhere(self.held != placed)[0].tolist()
            held, wanted = self.held[layer, slot], placed[layer, slot]
            raise ValueError(f"layer {layer} slot {slot} holds expert {held}, but {wanted} is placed there")
        filled = np.argwhere(self.held != EMPTY).tolist()
        if self._trains or not filled:
            return
        layer, slot = filled[self._next_check % len(filled)]
        self._next_check += 1
        expert = int(self.held[layer, slot])
        if self.digests[layer, expert] != digest(self.tensors(layer, slot)):
            raise ValueError(f"layer {layer} expert {expert} in slot {slot} has changed: its digest is another one")
