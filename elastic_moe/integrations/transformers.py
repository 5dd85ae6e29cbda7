"""elasticize: give a transformers MoE model its experts in slots, spread over the ranks of a runtime."""

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from elastic_moe.errors import CheckpointError, TransferFailed
from elastic_moe.exchange.epochs import TokenShape
from elastic_moe.experts.layout import ExpertLayout
from elastic_moe.experts.slots import SlotExperts
from elastic_moe.layer import ElasticMoELayer
from elastic_moe.placement.placement import EMPTY
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.weights.checkpoint import CheckpointReader
from elastic_moe.weights.conversion import target_dtypes
from elastic_moe.weights.disk import READERS, Disk
from elastic_moe.weights.holders import Holders, other_members
from elastic_moe.weights.instance import find_holders
from elastic_moe.weights.manifest import DigestFile
from elastic_moe.weights.materialize import materialize, set_tensor, untied
from elastic_moe.weights.memory import InMemory
from elastic_moe.weights.reserves import FoundHolders
from elastic_moe.weights.shards import has_weights
from elastic_moe.weights.sources import Origin, Source, fill
from elastic_moe.weights.store import ExpertStore

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes to read in all) while a checkpoint is loaded."""

_EXPERTS_INTERFACE = ("num_experts", "has_gate", "has_bias", "is_transposed")


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The `experts` modules of all MoE layers by qualified name, in the order of the layers.

    Raises:
        ValueError: there is none, or they differ in their number of experts.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, ElasticMoELayer) and all(hasattr(module, key) for key in _EXPERTS_INTERFACE)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts module that transformers (>= 5) can dispatch to")
    sizes = {int(getattr(module, "num_experts")) for module in found.values()}  # noqa: B009
    if len(sizes) > 1:
        raise ValueError(f"the MoE layers have different numbers of experts {sorted(sizes)}; one number is supported")
    return found


def meta_model(
    folder: str | Path, dtype: torch.dtype | None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The model of a checkpoint on the meta device: structure, no memory. `dtype` None means the checkpoint's own."""
    config = config or AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)


def elasticize(
    model: PreTrainedModel,
    runtime: ElasticRuntime,
    *,
    checkpoint: str | Path | None = None,
    slots_per_rank: int | None = None,
    redundant_slots: int = 0,
    load_from: Sequence[str] = (),
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Replace the experts modules of `model`, in place, by `ElasticMoELayer`s and load this rank's slots.

    With `checkpoint`, `model` is on the meta device (`meta_model`): dense weights are read whole, experts one at a
    time into their slots and nowhere else; the files stay open, the last source of a lost expert. Without,
    `model` holds all its weights and each rank keeps its share.

    Args:
        model: a transformers MoE model whose blocks call `experts(hidden_states, top_k_index, top_k_weights)`.
        runtime: the group; its experts are placed here if they are not yet.
        checkpoint: folder with safetensors and config.json.
        slots_per_rank: S; default ceil(E / R) + `redundant_slots`.
        redundant_slots: spare slots per rank and layer, filled with replicas.
        load_from: URLs of servers that run the same model: weights are taken from them, whatever their number of ranks,
            and `checkpoint` is read for the rest; it may hold a config.json alone then.
        progress: told of the bytes read.

    Returns:
        `model`.

    Raises:
        ValueError: the model has no experts module, or a checkpoint is missing for a model on the meta device.
        NotEnoughSlots: fewer slots than experts.
        CheckpointError: the checkpoint is incomplete or does not fit.
    """
    experts = find_experts(model)
    on_meta = any(p.is_meta for p in model.parameters())
    if on_meta and checkpoint is None:
        raise ValueError("the model is on the meta device: give checkpoint=FOLDER to load it from")
    layouts = {name: ExpertLayout.of_module(module) for name, module in experts.items()}
    first = next(iter(layouts.values()))
    placement = runtime.place(
        len(experts),
        first.num_experts,
        slots_per_rank=slots_per_rank,
        redundant_slots=redundant_slots,
        tokens=_token_shape(model, first),
        expert_bytes=max(layout.num_bytes for layout in layouts.values()),
    )
    if checkpoint is not None:
        return _load(model, runtime, experts, Path(checkpoint), load_from, progress)
    trains = any(p.requires_grad for module in experts.values() for p in module.parameters())
    held = [[getattr(module, name).detach() for name in layouts[key].names] for key, module in experts.items()]
    store = ExpertStore(_swap(model, runtime, experts), trains=trains)
    fill(store.wants(placement.of_rank(runtime.rank)), store, [InMemory(held)], runtime.pool.loaded)
    runtime.hold(store)
    nn.Module.to(model, runtime.device)  # not the model's own `to`, whose wrapper types cannot see through
    return model


def _token_shape(model: PreTrainedModel, layout: ExpertLayout) -> TokenShape:
    text = model.config.get_text_config()
    return TokenShape(text.hidden_size, getattr(text, "num_experts_per_tok", 0), layout.dtypes[0])


def _swap(model: PreTrainedModel, runtime: ElasticRuntime, experts: dict[str, nn.Module]) -> list[SlotExperts]:
    """Put an ElasticMoELayer in the place of each experts module. Returns their slots, which are empty."""
    pool, layers = runtime.pool, []
    for number, (name, module) in enumerate(experts.items()):
        setattr(module, "_is_hf_initialized", True)  # noqa: B010 - it has no tensors left for transformers to initialise
        slots = SlotExperts(module, ExpertLayout.of_module(module), pool.placement.slots_per_rank, runtime.device)
        layers.append(ElasticMoELayer(number, slots, pool))
        model.set_submodule(name, layers[-1])
    pool.idle.turns = [layer.join_idle for layer in layers]
    return [layer.experts for layer in layers]


def _load(
    model: PreTrainedModel,
    runtime: ElasticRuntime,
    experts: dict[str, nn.Module],
    folder: Path,
    seeds: Sequence[str],
    progress: Progress | None,
) -> PreTrainedModel:
    """Everything that this rank needs: from those who have it in memory (the members, if it is a newcomer; else the
    instances `seeds`), then from the disk, if there is a checkpoint."""
    names, pool = list(experts), runtime.pool
    layouts = {name: ExpertLayout.of_module(module) for name, module in experts.items()}
    form = _form(layouts, model)
    reader = CheckpointReader(folder, model, layouts) if has_weights(folder) else None
    holders = _holders(runtime, seeds, form)
    held = holders.holdings if holders else []
    if reader is None and not held:
        raise CheckpointError(_no_weights(folder, seeds, holders))
    goal = pool.placement.of_rank(runtime.rank)
    dense_names = reader.dense_names() if reader else sorted({name for holding in held for name in holding.dense})
    counts = (goal != EMPTY).sum(axis=1).tolist()
    total = sum(layouts[name].num_bytes * count for name, count in zip(names, counts, strict=True))
    total += _dense_bytes(model, dense_names)

    def tell() -> None:
        if progress:
            from_memory = sum(n for origin, n in pool.loaded.num_bytes.items() if origin is not Origin.DISK)
            read = reader.bytes_read if reader else 0
            progress(read + from_memory + (holders.dense_bytes if holders else 0), total)

    had = _dense_from(holders, model, dense_names, runtime.device) if holders else set()
    if reader is None and len(had) < len(dense_names):
        lacking = next(name for name in dense_names if name not in had)
        raise CheckpointError(f"{lacking} can be had from no running server, and {folder} holds no weights")
    disk = None
    if reader:
        read = partial(_read_expert, reader, names)
        disk = Disk(read, READERS[runtime.device.type])
        reader.on_slice(runtime.pulse.beat)
        for name, tensor in reader.read_dense(runtime.device, but=had):
            set_tensor(model, name, tensor)
            tell()
    store = ExpertStore(_swap(model, runtime, experts))
    if holders and runtime.is_member:  # another instance's digests are the truth of this one
        holders.tell_truth(store)
    pool.loaded.on_progress = tell
    try:
        fill(store.wants(goal), store, [source for source in (holders, disk) if source], pool.loaded)
    except TransferFailed as error:
        if runtime.is_member:  # a founder has nothing to wait for
            raise CheckpointError(str(error)) from error
        raise
    if holders:
        log.info("dense weights: %.1f MB from memory of others; experts: %s", holders.dense_bytes / 1e6, pool.loaded)
        holders.close()
    materialize(model, runtime.device, reader.missing if reader else untied(model))
    dense = model.state_dict()
    kept = DigestFile(folder, reader.fingerprint, form) if reader and not seeds else None
    runtime.hold(store, disk, {name: dense[name] for name in dense_names}, kept, form, _others(runtime, seeds, form))
    return model.eval()


def _holders(runtime: ElasticRuntime, seeds: Sequence[str], form: str) -> Holders | None:
    """Who has the weights in memory: the members for a newcomer, and the seeds for all."""
    seat = runtime.seat
    if runtime.is_member:
        find = partial(find_holders, seeds, seat.wire.token)
        return Holders(find(), runtime.deadlines, form, find) if seeds else None
    members = other_members(runtime.view, seat.member, seat.wire)
    return Holders(members, runtime.deadlines, form, lambda: [*members, *find_holders(seeds, seat.wire.token)])


def _others(runtime: ElasticRuntime, seeds: Sequence[str], form: str) -> list[Source]:
    """Where lost experts come from beside the disk."""
    find = partial(find_holders, seeds, runtime.seat.wire.token)
    return [FoundHolders(Origin.INSTANCE, find, runtime.deadlines, form, runtime.pulse)] if seeds else []


def _read_expert(
    reader: CheckpointReader, names: Sequence[str], layer: int, expert: int, out: Sequence[torch.Tensor]
) -> int:
    return reader.read_expert(names[layer], expert, out)


def _form(layouts: Mapping[str, ExpertLayout], model: PreTrainedModel) -> str:
    """Names how all weights lie in memory."""
    form = list(layouts.values()), sorted(target_dtypes(model).items())
    return hashlib.sha256(repr(form).encode()).hexdigest()[:16]


def _no_weights(folder: Path, seeds: Sequence[str], holders: Holders | None) -> str:
    if holders and holders.refused:
        return f"model.load_from={','.join(seeds)}: its weights have another form: give the same model and model.dtype"
    return f"model.load_from={','.join(seeds)}: no server there gives weights, and {folder} holds none"


def _dense_bytes(model: PreTrainedModel, names: Collection[str]) -> int:
    """As they are in memory."""
    state, dtypes = model.state_dict(), target_dtypes(model)
    return sum(state[name].numel() * dtypes[name].itemsize for name in names)


def _dense_from(
    holders: Holders, model: PreTrainedModel, names: Collection[str], device: torch.device
) -> Collection[str]:
    """Take dense weights from those who have them in memory. Returns the names of those that were had."""
    state, dtypes = model.state_dict(), target_dtypes(model)
    out = {name: torch.empty(state[name].shape, dtype=dtypes[name], device=device) for name in names}
    had = set()
    for name in holders.dense(out):
        set_tensor(model, name, out[name])
        had.add(name)
    return had


class LoadTimer:
    """Counts what was loaded and how fast, for the line at the end."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self.bytes = 0

    def __call__(self, done: int, total: int) -> None:
        """A `Progress`."""
        self.bytes = done

    def summary(self) -> str:
        """For example `13.9 MB in 0.21 s (0.07 GB/s)`."""
        seconds = time.monotonic() - self._begin
        return f"{self.bytes / 1e6:.1f} MB in {seconds:.2f} s ({self.bytes / 1e9 / seconds:.2f} GB/s)"
