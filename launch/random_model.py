"""A Qwen3-MoE with random weights and the demo model's tokenizer: larger experts than the demo's, and no download."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    "max_position_embeddings": 8192,
    "initializer_range": 0.05,
}
"""4 layers x 16 experts of 1.6M parameters: 6.3 MB each in float32, 403 MB in all."""
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
MEDIUM: dict[str, Any] = QWEN3_30B | {"num_hidden_layers": 8}
"""A sixth of the layers: 9.7 GB."""
SHAPES = {"small": SMALL, "medium": MEDIUM, "qwen3_30b": QWEN3_30B}


def bytes_per_step(shape: dict[str, Any], num_tokens: int, num_gpus: int = 1) -> float:
    """Weights that each GPU reads in a decoding step of T tokens, in bfloat16: all dense ones, and its share of the
    experts as far as random choices hit them."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] + shape["num_key_value_heads"]
    attention = 2 * hidden * shape["head_dim"] * heads
    hit = 1 - (1 - shape["num_experts_per_tok"] / shape["num_experts"]) ** num_tokens
    experts = hit * shape["num_experts"] * 3 * hidden * shape["moe_intermediate_size"]
    return 2 * (shape["num_hidden_layers"] * (attention + experts / num_gpus) + hidden * shape["vocab_size"])


@contextmanager
def random_model(seed: int, shape: dict[str, Any]) -> Iterator[list[str]]:
    """What launch/serve.py is told to serve such a model, whose files are there meanwhile."""
    with tempfile.TemporaryDirectory(prefix="random-model-") as folder:
        make_random_model(Path(folder), seed, shape)
        yield ["model=hf", f"model.path={folder}", "model.name=random"]


def make_random_model(folder: Path, seed: int, shape: dict[str, Any] = SHAPE) -> None:
    """Write a bfloat16 checkpoint, initialised as transformers does it, named as transformers saves it.

    One part after the other (embedding, each layer, norm, head) is filled, on the GPU if there is one, and written to a
    file of its own: never more than a layer is in memory. The values are a function of the seed, the shape and the kind
    of device.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Qwen3MoeConfig(**shape)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(len(model.model.layers)))]
    names += ["model.norm", "lm_head"]
    files, num_bytes = {}, 0
    for number, name in enumerate(names):
        file = f"model-{number + 1:05}-of-{len(names):05}.safetensors"
        sizes = _write_part(model, name, seed * len(names) + number, device, folder / file)
        files |= dict.fromkeys(sizes, file)
        num_bytes += sum(sizes.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the ranks that will share this GPU
    for name in TOKENIZER:
        shutil.copy(REPO / "examples" / "demo_model" / name, folder)


def _write_part(model: Any, name: str, seed: int, device: Any, path: Path) -> dict[str, int]:
    """Fill the module `name` of a model on the meta device, write it, and empty it again. Bytes by name in the file."""
    import torch
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    part = model.get_submodule(name).to_empty(device=device)
    torch.manual_seed(seed)
    part.apply(model._init_weights)
    tensors = {f"{name}.{key}": tensor.cpu() for key, tensor in part.state_dict().items()}
    part.to("meta")
    tensors = revert_weight_conversion(model, tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return {key: tensor.nbytes for key, tensor in tensors.items()}
