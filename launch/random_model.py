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


QWEN3_30B: dict[str, Any] = SHAPE | {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
"""As Qwen3-30B-A3B, with the demo's small vocabulary: 58 GB of experts in bfloat16."""
SMALL: dict[str, Any] = QWEN3_30B | {"num_hidden_layers": 4, "num_experts": 64}
"""Half the experts of a twelfth of the layers: 2.4 GB, so that a benchmark does not spend its time on writing and
reading it."""
SHAPES = {"small": SMALL, "qwen3_30b": QWEN3_30B}


def bytes_per_step(shape: dict[str, Any], num_tokens: int, num_gpus: int = 1) -> float:
    """Weights that each GPU reads in a decoding step of T tokens, in bfloat16: all dense ones, and its share of the
    experts as far as random choices hit them."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] + shape["num_key_value_heads"]
    attention = 2 * hidden * shape["head_dim"] * heads
    hit = 1 - (1 - shape["num_experts_per_tok"] / shape["num_experts"]) ** num_tokens
    experts = hit * shape["num_experts"] * 3 * hidden * shape["moe_intermediate_size"]
    return 2 * (shape["num_hidden_layers"] * (attention + experts / num_gpus) + hidden * shape["vocab_size"])


def make_random_model(folder: Path, seed: int, shape: dict[str, Any] = SHAPE) -> None:
    """Write a bfloat16 checkpoint, of `SHAPE` by default: 4 layers x 16 experts of 1.6M parameters (6.3 MB each in
    float32, 403 MB in all)."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(seed)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model: Any = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    if on_gpu:
        torch.cuda.empty_cache()  # for the ranks that will share this GPU
    for name in TOKENIZER:
        shutil.copy(REPO / "examples" / "demo_model" / name, folder)
