"""elasticize: give a transformers MoE model its experts in slots, spread over the ranks of a runtime."""

import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from elastic_moe.exchange.epochs import TokenShape
from elastic_moe.experts.layout import ExpertLayout
from elastic_moe.experts.slots import SlotExperts
from elastic_moe.integrations.loading import Loading, Progress, Whence
from elastic_moe.layer import ElasticMoELayer
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.weights.memory import InMemory
from elastic_moe.weights.sources import fill
from elastic_moe.weights.store import ExpertStore

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
    whence: Whence | None = None,
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
        whence: where weights come from beside the checkpoint, which may hold a config.json alone then.
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
        loading = Loading(model, runtime, experts, Path(checkpoint), whence or Whence())
        loading.load(lambda: _swap(model, runtime, experts), progress)
        return model.eval()
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
