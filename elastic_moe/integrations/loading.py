"""The weights of one rank at its start: from whoever has them in memory, then from the disk."""

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from elastic_moe.backup.source import backups
from elastic_moe.config import SOURCES, BackupConfig
from elastic_moe.errors import CheckpointError, TransferFailed
from elastic_moe.experts.layout import ExpertLayout
from elastic_moe.experts.slots import SlotExperts
from elastic_moe.placement.placement import EMPTY
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.weights.checkpoint import CheckpointReader
from elastic_moe.weights.conversion import target_dtypes
from elastic_moe.weights.disk import READERS, Disk
from elastic_moe.weights.holders import Holder, Holders, other_members
from elastic_moe.weights.instance import find_holders
from elastic_moe.weights.manifest import DigestFile
from elastic_moe.weights.materialize import materialize, set_tensor, untied
from elastic_moe.weights.peer_gpu import PeerGpus
from elastic_moe.weights.reserves import FoundHolders
from elastic_moe.weights.shards import has_weights
from elastic_moe.weights.sources import Origin, Source, fill
from elastic_moe.weights.store import ExpertStore

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes to read in all) while weights are loaded."""


class Whence(NamedTuple):
    """Where weights come from beside a checkpoint."""

    seeds: Sequence[str] = ()
    """URLs of servers that run the same model, whatever their number of ranks."""
    backup: BackupConfig = BackupConfig()
    """How the backups of nodes are read, if there are any."""
    sources: Sequence[str] = SOURCES
    """Where lost experts may come from, see `ElasticConfig.sources`."""


class Loading:
    """Everything that this rank needs: from the members, if it is a newcomer, else from the instances of `whence`; what
    they have not, from the checkpoint in `folder`, if there is one."""

    def __init__(
        self,
        model: PreTrainedModel,
        runtime: ElasticRuntime,
        experts: Mapping[str, nn.Module],
        folder: Path,
        whence: Whence,
    ) -> None:
        """Open the checkpoint, and greet who has the weights in memory.

        Raises:
            CheckpointError: the checkpoint is incomplete or does not fit; or there is none, and nobody has the weights.
        """
        self._began_at = time.monotonic()
        self._model, self._runtime, self._folder = model, runtime, folder
        self._seeds, self._backup, self._sources = whence
        self._names = list(experts)
        self._layouts = {name: ExpertLayout.of_module(module) for name, module in experts.items()}
        self._form = _form(self._layouts, model)
        self._reader = CheckpointReader(folder, model, self._layouts) if has_weights(folder) else None
        self._gpus = self._find_gpus()
        self._holders = self._find_holders()
        holdings = self._holders.holdings if self._holders else []
        if self._reader is None and not holdings:
            raise CheckpointError(self._no_weights())
        named = {name for holding in holdings for name in holding.dense}
        self._dense_names = self._reader.dense_names() if self._reader else tuple(sorted(named))

    def load(self, swap: Callable[[], list[SlotExperts]], progress: Progress | None) -> None:
        """Fill the model, and have the runtime hold its experts.

        Args:
            swap: puts empty slots into the place of the experts modules. Called when dense weights are there.
            progress: told of the bytes.

        Raises:
            CheckpointError: something can be had from nowhere.
            TransferFailed: an expert of a newcomer can be had from nowhere now.
        """
        model, runtime, reader, holders = self._model, self._runtime, self._reader, self._holders
        tell = self._teller(progress)
        self._load_dense(tell)
        store = ExpertStore(swap())
        if holders and runtime.is_member:  # another instance's digests are the truth of this one
            holders.tell_truth(store)
        disk = Disk(self._read_expert, READERS[runtime.device.type]) if reader else None
        runtime.pool.loaded.on_progress = tell
        goal = runtime.pool.placement.of_rank(runtime.rank)
        others = self._others()
        sources = [source for source in (self._gpus, holders, disk) if source]
        sources += [] if runtime.is_member else others
        try:
            fill(store.wants(goal), store, sources, runtime.pool.loaded)
        except TransferFailed as error:
            if runtime.is_member:  # a founder has nothing to wait for
                raise CheckpointError(str(error)) from error
            raise
        finally:
            for memory in (self._gpus, holders):
                if memory:
                    memory.close()
        self._say()
        materialize(model, runtime.device, reader.missing if reader else untied(model))
        state = model.state_dict()
        dense = {name: state[name] for name in self._dense_names}
        kept = DigestFile(self._folder, reader.fingerprint, self._form) if reader and not self._seeds else None
        runtime.hold(store, disk if Origin.DISK in self._sources else None, dense, kept, self._form, others)

    def _find_seeds(self) -> list[Holder]:
        return find_holders(self._seeds, self._runtime.seat.wire.token)

    def _find_holders(self) -> Holders | None:
        """Who has the weights in memory: the members for a newcomer, and the seeds for all."""
        runtime, seat = self._runtime, self._runtime.seat
        if runtime.is_member:
            seeds = self._find_seeds()
            return Holders(seeds, runtime.deadlines, self._form, self._find_seeds) if self._seeds else None
        members = [m for m in other_members(runtime.view, seat.member, seat.wire) if m.origin in self._sources]
        return Holders(members, runtime.deadlines, self._form, lambda: [*members, *self._find_seeds()])

    def _find_gpus(self) -> PeerGpus | None:
        """Of the members on this host, for a newcomer; or of the seeds, if they are here."""
        runtime, seat = self._runtime, self._runtime.seat
        if runtime.device.type != "cuda":
            return None

        def members() -> list[Holder]:
            found = other_members(runtime.view, seat.member, seat.wire)
            return [holder for holder in found if holder.origin is Origin.NODE and Origin.NODE in self._sources]

        nearest, find = (Origin.INSTANCE, self._find_seeds) if runtime.is_member else (Origin.NODE, members)
        return PeerGpus(nearest, find, runtime.deadlines, self._form)

    def _others(self) -> list[Source]:
        """Where lost experts come from beside the disk."""
        runtime, seat, form = self._runtime, self._runtime.seat, self._form
        others = backups(
            self._backup, lambda: runtime.view, seat.member, seat.wire, runtime.deadlines, form, runtime.pulse
        )
        seeds = FoundHolders(Origin.INSTANCE, self._find_seeds, runtime.deadlines, form, runtime.pulse)
        return [source for source in (*others, *([seeds] if self._seeds else [])) if source.nearest in self._sources]

    def _read_expert(self, layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
        if self._reader is None:
            raise CheckpointError(f"{self._folder} holds no weights")
        return self._reader.read_expert(self._names[layer], expert, out)

    def _load_dense(self, tell: Callable[[], None]) -> None:
        reader, device = self._reader, self._runtime.device
        had = self._dense_from_holders() if self._holders else set()
        if reader is None:
            if lacking := [name for name in self._dense_names if name not in had]:
                where = f"no running server, and {self._folder} holds no weights"
                raise CheckpointError(f"{lacking[0]} can be had from {where}")
            return
        reader.on_slice(self._runtime.pulse.beat)
        for name, tensor in reader.read_dense(device, but=had):
            set_tensor(self._model, name, tensor)
            tell()

    def _dense_from_holders(self) -> Collection[str]:
        """The names of those that were had."""
        state, dtypes, had = self._model.state_dict(), target_dtypes(self._model), set()
        device = self._runtime.device
        out = {n: torch.empty(state[n].shape, dtype=dtypes[n], device=device) for n in self._dense_names}
        for name in self._gpus.dense(out) if self._gpus else ():
            set_tensor(self._model, name, out.pop(name))
            had.add(name)
        for name in self._holders.dense(out) if self._holders else ():
            set_tensor(self._model, name, out[name])
            had.add(name)
            self._runtime.pulse.beat()
        return had

    def _teller(self, progress: Progress | None) -> Callable[[], None]:
        """Tells `progress`, if it is given, what has come of how much, as it is in memory."""
        pool, state, dtypes = self._runtime.pool, self._model.state_dict(), target_dtypes(self._model)
        counts = (pool.placement.of_rank(self._runtime.rank) != EMPTY).sum(axis=1).tolist()
        total = sum(self._layouts[name].num_bytes * count for name, count in zip(self._names, counts, strict=True))
        total += sum(state[name].numel() * dtypes[name].itemsize for name in self._dense_names)

        def tell() -> None:
            if progress:
                from_memory = sum(n for origin, n in pool.loaded.num_bytes.items() if origin is not Origin.DISK)
                from_memory += self._holders.dense_bytes if self._holders else 0
                progress(from_memory + (self._reader.bytes_read if self._reader else 0), total)

        return tell

    def _say(self) -> None:
        """Log how much came from where, how fast."""
        experts, seconds = self._runtime.pool.loaded, time.monotonic() - self._began_at
        found = (self._holders.dense_bytes if self._holders else 0) + (self._gpus.dense_bytes if self._gpus else 0)
        state, dtypes = self._model.state_dict(), target_dtypes(self._model)
        dense = sum(state[name].numel() * dtypes[name].itemsize for name in self._dense_names)
        total = sum(experts.num_bytes.values()) + dense
        told = (
            "weights: %.2f GB in %.2f s (%.2f GB/s); %.1f of %.1f MB of dense ones from memory of others; experts: %s"
        )
        log.info(told, total / 1e9, seconds, total / 1e9 / seconds, found / 1e6, dense / 1e6, experts)

    def _no_weights(self) -> str:
        seeds = ",".join(self._seeds)
        if self._holders and self._holders.refused:
            return f"model.load_from={seeds}: its weights have another form: give the same model and model.dtype"
        return f"model.load_from={seeds}: no server there gives weights, and {self._folder} holds none"


def _form(layouts: Mapping[str, ExpertLayout], model: PreTrainedModel) -> str:
    """Names how all weights lie in memory."""
    form = list(layouts.values()), sorted(target_dtypes(model).items())
    return hashlib.sha256(repr(form).encode()).hexdigest()[:16]
