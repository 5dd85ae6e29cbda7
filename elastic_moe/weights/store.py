"""ExpertStore: the experts one rank holds, of all MoE layers, with their digests. The truth about "who has what"."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from elastic_moe.errors import CheckpointError, DigestMismatch, TransferFailed
from elastic_moe.experts.slots import SlotExperts
from elastic_moe.placement.placement import EMPTY
from elastic_moe.weights.digest import digest

ReadExpert = Callable[[int, int, Sequence[torch.Tensor]], int]
"""`read(layer, expert, out)` fills the tensors of an expert from outside the group and returns the bytes read."""

UNKNOWN = -1
"""A digest nobody has computed yet."""


class ExpertStore:
    """Slots of every layer and what is in them.

    `held` int32 [L, S] is this rank's inventory. A slot is marked empty before its bytes are overwritten and filled
    again only when the new bytes are verified, so a transfer that breaks off never leaves a slot that lies.
    """

    def __init__(self, layers: Sequence[SlotExperts], held: np.ndarray, read: ReadExpert | None = None) -> None:
        """`read` is the source of last resort: the checkpoint on disk."""
        self.layers = list(layers)
        self.held = np.array(held, dtype=np.int32)
        self.num_experts = self.layers[0].layout.num_experts
        self.digests = np.full((len(self.layers), self.num_experts), UNKNOWN, dtype=np.int64)
        self._read = read

    @property
    def num_slots(self) -> int:
        """S."""
        return self.held.shape[1]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer in memory (of the first layer; they are alike in practice)."""
        return self.layers[0].layout.num_bytes

    def record_digests(self) -> None:
        """Compute the digest of every expert held here that is not known yet; without a checkpoint, which experts in
        training have not, of all."""
        if self._read is None:
            self.digests.fill(UNKNOWN)
        for layer, slot in np.argwhere(self.held != EMPTY):
            expert = self.held[layer, slot]
            if self.digests[layer, expert] == UNKNOWN:
                self.digests[layer, expert] = digest(self.layers[layer].slot_tensors(int(slot)))

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

    def grow(self, num_slots: int) -> None:
        """Have at least `num_slots` slots in every layer; the new ones are empty."""
        more = num_slots - self.num_slots
        if more <= 0:
            return
        for experts in self.layers:
            experts.grow(num_slots)
        self.held = np.pad(self.held, ((0, 0), (0, more)), constant_values=EMPTY)

    def tensors(self, layer: int, slot: int) -> Sequence[torch.Tensor]:
        """Views of the tensors in a slot."""
        return self.layers[layer].slot_tensors(slot)

    def vacate(self, layer: int, slot: int) -> Sequence[torch.Tensor]:
        """Mark a slot empty and return its tensors to be overwritten."""
        self.held[layer, slot] = EMPTY
        return self.tensors(layer, slot)

    def accept(self, layer: int, slot: int, expert: int) -> bool:
        """Verify the bytes written into a vacated slot and mark it filled. False: the digest is wrong."""
        known, found = self.digests[layer, expert], digest(self.tensors(layer, slot))
        if known not in (UNKNOWN, found):
            return False
        self.digests[layer, expert] = found
        self.held[layer, slot] = expert
        return True

    def is_right(self, layer: int, expert: int, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether `tensors` have the digest of an expert, as far as it is known."""
        return self.digests[layer, expert] in (UNKNOWN, digest(tensors))

    def install(self, layer: int, slot: int, expert: int, tensors: Sequence[torch.Tensor]) -> None:
        """Copy an expert that was verified elsewhere (in staging) into a slot."""
        for target, source in zip(self.vacate(layer, slot), tensors, strict=True):
            target.copy_(source, non_blocking=True)
        self.held[layer, slot] = expert

    def read_from_disk(self, layer: int, slot: int, expert: int) -> None:
        """Fill a vacated slot from the checkpoint, verified.

        Raises:
            TransferFailed: there is no checkpoint, or it cannot be read; `DigestMismatch`: its bytes are not those of
                the group.
        """
        self._read_into(layer, expert, self.tensors(layer, slot))
        if not self.accept(layer, slot, expert):
            raise self._mismatch(layer, expert)

    def read_into(self, layer: int, expert: int, out: Sequence[torch.Tensor]) -> None:
        """Read an expert from the checkpoint into `out`, verified.

        Raises:
            TransferFailed: there is no checkpoint, or it cannot be read; `DigestMismatch`: its bytes are not those of
                the group.
        """
        self._read_into(layer, expert, out)
        if not self.is_right(layer, expert, out):
            raise self._mismatch(layer, expert)

    def read_aside(self, layer: int, expert: int) -> Sequence[torch.Tensor] | None:
        """An expert from the checkpoint into new tensors, for another rank; None when it is not to be had right."""
        tensors = [torch.empty_like(tensor) for tensor in self.tensors(layer, 0)]
        try:
            self.read_into(layer, expert, tensors)
        except TransferFailed:
            return None
        return tensors

    def _mismatch(self, layer: int, expert: int) -> DigestMismatch:
        where = f"layer {layer} expert {expert}"
        return DigestMismatch(f"{where}: no live copy, and the checkpoint's bytes have another digest than at start")

    def _read_into(self, layer: int, expert: int, out: Sequence[torch.Tensor]) -> None:
        where = f"layer {layer} expert {expert}"
        if self._read is None:
            raise TransferFailed(f"{where}: no live copy, and no checkpoint to read it from")
        try:
            self._read(layer, expert, out)
        except (CheckpointError, OSError) as error:
            raise TransferFailed(f"{where}: no live copy, and the checkpoint failed: {error}") from error
