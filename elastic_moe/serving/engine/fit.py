"""What a model runs on, and whether it fits what was asked for."""

import torch
from transformers import PreTrainedModel

from elastic_moe.config import ModelConfig, ServeConfig
from elastic_moe.integrations.transformers import find_experts
from elastic_moe.membership.launch import Launch
from elastic_moe.placement.placement import initial_placement
from elastic_moe.runtime.initial_placement import read_loads


def check_fit(model: PreTrainedModel, launch: Launch, config: ServeConfig) -> None:
    """Whether the experts of a model fit the configuration. Before ranks meet: one that refuses then would look lost to
    those that still come.

    Raises:
        ValueError: they do not; the message says what would.
    """
    experts = list(find_experts(model).values())
    num_experts = int(getattr(experts[0], "num_experts"))  # noqa: B009
    if config.elastic.slots_per_rank is not None:
        initial_placement(1, num_experts, launch.topology, config.elastic.slots_per_rank)
    if config.eplb.initial_loads:
        read_loads(config.eplb.initial_loads, len(experts), num_experts)


def pick_device(
    config: ModelConfig, local_rank: int, local_world_size: int, *, may_share: bool = False
) -> torch.device:
    """The device of this rank. With `may_share` ranks take turns over fewer GPUs, if cuda is asked for.

    Raises:
        ValueError: cuda is asked for and there are fewer GPUs than local ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and (not gpus or (gpus < local_world_size and not may_share)):
        raise ValueError(
            f"model.device=cuda: {local_world_size} local ranks but {gpus} GPUs; start fewer, use cpu, or share GPUs "
            "with exchange.kind=symmetric"
        )
    if config.device == "cpu" or not gpus or (gpus < local_world_size and config.device != "cuda"):
        return torch.device("cpu")
    torch.cuda.set_device(local_rank % gpus)
    return torch.device("cuda", local_rank % gpus)


def pick_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a `model.dtype`; None for auto."""
    return None if name == "auto" else getattr(torch, name)


def eos_token_ids(model: PreTrainedModel) -> list[int]:
    """End-of-sequence tokens of a model: of its generation config, else of its config."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    if ids is None:
        ids = model.config.get_text_config().eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
