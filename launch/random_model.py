"""A Qwen3-MoE with random weights and the demo model's tokenizer: larger experts than the demo's, and no download."""

import shutil
from pathlib import Path
from typing import Any

from launch.config import REPO

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
}


def make_random_model(folder: Path, seed: int) -> None:
    """Write a checkpoint of 4 layers x 16 experts of 1.6M parameters (6.3 MB each in float32, 403 MB in all)."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE))
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(REPO / "examples" / "demo_model" / name, folder)
