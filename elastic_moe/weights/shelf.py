"""What an engine gives of its own memory."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from elastic_moe.memory import device_memory
from elastic_moe.placement.placement import EMPTY
from elastic_moe.weights.digest import digest
from elastic_moe.weights.holding import DenseTensor, Given, GpuTensor, Holding, Shared
from elastic_moe.weights.server import NOTHING, Gift
from elastic_moe.weights.store import UNKNOWN, ExpertStore

log = logging.getLogger(__name__)


class EngineShelf:
    """Dense tensors, and the experts that its slots hold at the moment of each question."""

    def __init__(
        self,
        store: ExpertStore,
        dense: Mapping[str, torch.Tensor] | None = None,
        form: str = "",
    ) -> None:
        """`dense` by its name in the state dict, verified: its digests of now count; `form`: see `Holding`."""
        self._store = store
        self._dense = dict(dense or {})
        self._digests = {name: digest([tensor]) for name, tensor in self._dense.items()}
        self._form = form
        self._stream: torch.cuda.Stream | None = None
        """A reader's copies wait for nothing that the model does, and it does not wait for them."""

    def holding(self) -> Holding:
        """See `Shelf.holding`."""
        store = self._store
        places = {(layer, int(store.held[layer, slot])) for layer, slot in np.argwhere(store.held != EMPTY).tolist()}
        return Holding(
            form=self._form,
            num_layers=len(store.held),
            num_experts=store.num_experts,
            experts=[(layer, expert, int(store.digests[layer, expert])) for layer, expert in sorted(places)],
            dense={
                name: DenseTensor(str(t.dtype), list(t.shape), self._digests[name]) for name, t in self._dense.items()
            },
        )

    def dense(self, name: str) -> Gift:
        """See `Shelf.dense`."""
        return self._gift([self._dense[name]], self._digests[name]) if name in self._dense else NOTHING

    def expert(self, layer: int, expert: int) -> Gift:
        """See `Shelf.expert`."""
        store = self._store
        if not 0 <= layer < len(store.held):
            return NOTHING
        slots = np.flatnonzero(store.held[layer] == expert).tolist() if expert != EMPTY else ()
        return self._gift(store.tensors(layer, slots[0]), int(store.digests[layer, expert])) if slots else NOTHING

    def share(self) -> Shared:
        """See `Shelf.share`."""
        store = self._store
        tensors = [[getattr(layer, name) for name in layer.layout.names] for layer in store.layers]
        if not tensors[0][0].is_cuda:
            return Shared()
        try:
            return Shared(
                store.held.tolist(),
                [[_shared(tensor) for tensor in some] for some in tensors],
                {name: _shared(tensor) for name, tensor in self._dense.items() if tensor.is_contiguous()},
            )
        except RuntimeError as error:  # of the driver; readers have other ways
            log.warning("this GPU's memory cannot be shared: %s", error)
            return Shared()

    def _gift(self, tensors: Sequence[torch.Tensor], known: int) -> Gift:
        """The digest goes with them that the group knows; their own if it knows none."""
        tensors = [tensor.detach() for tensor in tensors]
        if tensors[0].is_cuda:
            tensors = self._to_host(tensors)
        elif known == UNKNOWN:  # what is digested must be what is sent
            tensors = [tensor.clone() for tensor in tensors]
        header = Given(
            [str(t.dtype) for t in tensors],
            [list(t.shape) for t in tensors],
            digest(tensors) if known == UNKNOWN else known,
        )
        return Gift(header, [t.contiguous().view(-1).view(torch.uint8).numpy().data for t in tensors])

    def _to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensors[0].device)
        stream = self._stream
        with torch.cuda.stream(stream):
            copies = [torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        stream.synchronize()
        return copies


def _shared(tensor: torch.Tensor) -> GpuTensor:
    allocation, offset = device_memory.export(tensor.data_ptr(), tensor.device)
    return GpuTensor(allocation.hex(), offset, str(tensor.dtype), list(tensor.shape))
