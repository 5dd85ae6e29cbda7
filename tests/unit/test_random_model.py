"""The random model of the benchmarks: transformers loads it, and it is never in memory as a whole."""

import gc
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from launch.random_model import SHAPE, make_random_model

LAYERS = 6
TINY = SHAPE | {
    "vocab_size": 128,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
}


def alive() -> dict[int, int]:
    """Bytes of each storage in memory by its address."""
    things = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    tensors = (tensor for tensor in things if not tensor.is_meta)
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_transformers_loads_what_it_would_have_initialised(tmp_path: Path):
    make_random_model(tmp_path, 0, TINY)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    for name, tensor in model.state_dict().items():
        assert tensor.dtype is torch.bfloat16
        mean, std = tensor.float().mean().item(), tensor.float().std().item()
        if "norm" in name:
            assert (mean, std) == (1.0, 0.0), name
        else:
            assert abs(mean) < 0.01, name
            assert std == pytest.approx(TINY["initializer_range"], rel=0.1), name
    experts = [layer.mlp.experts.down_proj for layer in model.model.layers]
    assert not any(torch.equal(experts[0], other) for other in experts[1:])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]


def test_the_seed_makes_it(tmp_path: Path):
    made = []
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        make_random_model(tmp_path / name, seed, TINY)
        made.append(files_of(tmp_path / name))
    first, again, other = made
    assert first == again
    weights = [name for name in first if name.endswith(".safetensors")]
    assert len(weights) == LAYERS + 3
    assert {name for name in weights if first[name] == other[name]} == {
        f"model-{LAYERS + 2:05}-of-{LAYERS + 3:05}.safetensors"
    }


def test_no_more_than_a_layer_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gc.collect()
    before, most, written = alive(), 0, 0
    save_file = safetensors.torch.save_file

    def watched(tensors, path, metadata):
        nonlocal most, written
        most = max(most, sum(size for address, size in alive().items() if address not in before))
        written += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", watched)
    make_random_model(tmp_path, 0, TINY)
    layer = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert written > LAYERS * 0.9 * layer
    assert 0.9 * layer < most <= 1.1 * layer
