"""Live replicas as a source, into staging: experts wait beside their slots until all ranks swap them in."""

from collections.abc import Iterator, Sequence

import torch

from elastic_moe.transport.staging import Staging, Transfer
from elastic_moe.weights.sources import Asked, Came, Landing, Origin, Source, Told, Until, Want
from elastic_moe.weights.store import ExpertStore


class Staged(Landing):
    """Experts of one chunk, by want. Slots are not touched."""

    def __init__(self, store: ExpertStore) -> None:
        """`store` knows the digests, and what an expert looks like."""
        self._store = store
        self._waiting: dict[Want, Sequence[torch.Tensor]] = {}
        self._accepted: set[Want] = set()

    def put(self, want: Want, tensors: Sequence[torch.Tensor]) -> None:
        """Bytes that have come in memory of the transport's own."""
        self._waiting[want] = tensors

    def open(self, want: Want) -> Sequence[torch.Tensor]:
        """See `Landing.open`: what was put there, else memory of the host."""
        if want not in self._waiting:
            like = self._store.tensors(want.layer, want.slot)
            self.put(want, [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in like])
        return self._waiting[want]

    def accept(self, came: Sequence[Came]) -> list[bool]:
        """See `Landing.accept`."""
        rights = self._store.are_right(came, [self._waiting[want] for want, *_ in came])
        self._accepted.update(want for (want, *_), right in zip(came, rights, strict=True) if right)
        return rights

    def has(self, want: Want) -> bool:
        """See `Landing.has`."""
        return want in self._accepted

    def num_bytes(self, want: Want) -> int:
        """See `Landing.num_bytes`."""
        return self._store.num_bytes(want)

    def install(self) -> None:
        """Copy all that was accepted into its slots."""
        for want in self._accepted:
            self._store.install(want, self._waiting[want])


class Replicas(Source):
    """The live replicas that a transfer plan names, brought by the ranks that hold them."""

    nearest = Origin.OWN
    asked = Asked.TOGETHER

    def __init__(self, staging: Staging, transfer: Transfer, landing: Staged) -> None:
        """`transfer` is the same on all ranks, as each of them sees it. What comes is put into `landing`."""
        self._staging = staging
        self._transfer = transfer
        self._landing = landing

    def fetch(self, wants: Sequence[Want], landing: Landing, until: Until) -> Iterator[Told]:
        """See `Source.fetch`. All come, then each is told of: a loss may overtake the checking of many."""
        plan = self._transfer.plan
        for move, tensors in self._staging.bring(self._transfer).items():
            want = Want(move.layer, move.expert, move.target % plan.slots_per_rank)
            self._landing.put(want, tensors)
            yield [Came(want, Origin[plan.distance(move).name])]
