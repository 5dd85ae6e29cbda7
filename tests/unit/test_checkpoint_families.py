"""Reading a checkpoint by parts gives, bit for bit, the model that `from_pretrained` gives, for every family."""

import json
from pathlib import Path

import pytest
import torch
from support.families import FAMILIES, build, build_on_meta, layouts_of
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from elastic_moe.experts.layout import ExpertLayout
from elastic_moe.weights.checkpoint import CheckpointReader
from elastic_moe.weights.materialize import materialize, set_tensor

TOKENS = torch.arange(3, 15)[None]


class Ours(nn.Module):
    """In the place of an experts module: real memory with a pattern, while the rest is still on the meta device."""

    def __init__(self, layout: ExpertLayout) -> None:
        super().__init__()
        for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.full((layout.num_experts, *shape), 7.0, dtype=dtype)))


def read_layer(reader: CheckpointReader, module: str, layout: ExpertLayout) -> dict[str, torch.Tensor]:
    tensors = [
        torch.full((layout.num_experts, *shape), torch.nan, dtype=dtype)
        for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)
    ]
    for expert in reversed(range(layout.num_experts)):
        count = reader.read_expert(module, expert, [tensor[expert] for tensor in tensors])
        assert count == reader.bytes_per_expert(module)
    return {f"{module}.{name}": tensor for name, tensor in zip(layout.names, tensors, strict=True)}


def assert_same(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    ours = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    theirs = dict(reference.named_parameters(remove_duplicate=False))
    theirs |= dict(reference.named_buffers(remove_duplicate=False))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_load_then_materialize(family: str, tmp_path: Path) -> None:
    build(FAMILIES[family]()).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = build_on_meta(FAMILIES[family]())
    layouts = layouts_of(model)
    assert layouts
    with CheckpointReader(tmp_path, model, layouts) as reader:
        assert (reader.unexpected, reader.missing) == ((), frozenset())
        for module, layout in layouts.items():
            for name, tensor in read_layer(reader, module, layout).items():
                set_tensor(model, name, tensor)
        names = [name for name, tensor in reader.read_dense() if set_tensor(model, name, tensor) is None]
    assert names == list(reader.dense_names())
    materialize(model, "cpu", reader.missing)
    assert_same(model, reference)
    with torch.no_grad():
        ours, theirs = model(input_ids=TOKENS).logits, reference(input_ids=TOKENS).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)  # the last bits of a sum depend on where tensors lie


@pytest.mark.parametrize("family", FAMILIES)
def test_materialize_then_load_sharded_with_cast(family: str, tmp_path: Path) -> None:
    build(FAMILIES[family]()).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())) > 1
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = build_on_meta(FAMILIES[family](), torch.bfloat16)
    layouts = layouts_of(model)
    with CheckpointReader(tmp_path, model, layouts) as reader:
        for module, layout in layouts.items():
            model.set_submodule(module, Ours(layout))
        materialize(model, "cpu")
        for module, layout in layouts.items():
            ours = model.get_submodule(module)
            assert all(bool((tensor == 7).all()) for tensor in ours.parameters())
            for name, tensor in read_layer(reader, module, layout).items():
                model.get_parameter(name).data.copy_(tensor)
        for name, tensor in reader.read_dense():
            place = model.get_parameter_or_buffer(name)
            assert place.dtype == tensor.dtype, name
            place.data.copy_(tensor)
    assert_same(model, reference)
