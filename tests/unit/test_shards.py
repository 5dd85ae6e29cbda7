"""Files of a checkpoint that are not what they seem: cut while in use, quantised, twice the same tensor."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, build

from elastic_moe.errors import CheckpointError
from elastic_moe.experts.layout import ExpertLayout
from elastic_moe.integrations.transformers import find_experts
from elastic_moe.weights import shards as module
from elastic_moe.weights.checkpoint import CheckpointReader
from elastic_moe.weights.shards import DTYPES, Shards


def saved(folder: Path, **tensors: torch.Tensor) -> Shards:
    save_file(tensors, folder / "model.safetensors")
    return Shards(folder)


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SLICE_BYTES", 7)
    tensors = {
        name: torch.randint(0, 2, (3, 5, 16), dtype=torch.uint8).view(dtype) for name, dtype in DTYPES.items()
    } | {"none": torch.empty(0, 4), "one": torch.tensor(3.5)}
    shards, slices = saved(tmp_path, **tensors), []
    shards.on_slice = lambda: slices.append(1)
    for name, wanted in load_file(tmp_path / "model.safetensors").items():
        got = shards.read(name)
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape) == (shards.dtype(name), shards.shape(name))
        assert torch.equal(got.view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8))
        if got.ndim == 3:
            assert torch.equal(shards.read(name, 1).view(torch.uint8), wanted[1:2].view(torch.uint8))
            assert shards.num_bytes(name, 1) * 3 == shards.num_bytes(name) == got.nbytes
    assert len(slices) > 17 * 3 * 5 * 16 / 7


def test_a_file_that_is_cut_while_it_is_open_is_an_error_of_the_read(tmp_path: Path):
    """Of a mapped one the process would die by SIGBUS."""
    shards = saved(tmp_path, a=torch.ones(5000), b=torch.ones(5000))
    os.truncate(tmp_path / "model.safetensors", 21000)
    assert torch.equal(shards.read("a"), torch.ones(5000))
    with pytest.raises(
        CheckpointError, match=r"cannot read b: .*model\.safetensors ends at byte 21000, it has been cut"
    ):
        shards.read("b")


def test_a_disk_that_fails_is_an_error_of_the_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    shards = saved(tmp_path, a=torch.ones(5))
    monkeypatch.setattr(module.os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"cannot read a from .*Input/output error"):
        shards.read("a")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    for number in (1, 2):
        save_file({"w": torch.ones(number), f"x{number}": torch.ones(1)}, tmp_path / f"part{number}.safetensors")
    weight_map = {"w": "part1.safetensors", "x1": "part1.safetensors", "x2": "part2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"w is in .*part1\.safetensors and in .*part2\.safetensors"):
        Shards(tmp_path)


def test_the_fingerprint_is_that_of_the_headers(tmp_path: Path):
    found = []
    for name, tensor in {
        "same": torch.ones(4),
        "value": torch.zeros(4),
        "shape": torch.ones(2, 2),
        "dtype": torch.ones(4).int(),
    }.items():
        (tmp_path / name).mkdir()
        found.append(saved(tmp_path / name, w=tensor).fingerprint)
    assert found[0] == found[1]
    assert len(set(found)) == 3


def checkpoint(folder: Path, change) -> CheckpointReader:
    """Of a tiny Qwen3-MoE, whose tensors `change` has changed."""
    model = build(FAMILIES["qwen3_moe"]())
    model.save_pretrained(folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    layouts = {name: ExpertLayout.of_module(experts) for name, experts in find_experts(model).items()}
    return CheckpointReader(folder, model, layouts)


EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
DENSE = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", [EXPERT, DENSE])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_weights_that_need_a_scale_are_refused(tmp_path: Path, name: str, dtype: torch.dtype):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    with pytest.raises(
        CheckpointError, match=rf"{name} in .*safetensors is {str(dtype)[6:]}, where the model has a float"
    ):
        checkpoint(tmp_path, change)


@pytest.mark.parametrize("last", ["weight_scale_inv", "weight_scale", "scales", "zero_point", "qweight", "g_idx"])
def test_a_scale_that_nobody_would_use_is_refused(tmp_path: Path, last: str):
    beside = f"{EXPERT.removesuffix('weight')}{last}"
    with pytest.raises(CheckpointError, match=rf"{beside} in .*safetensors: the weights are quantised"):
        checkpoint(tmp_path, lambda tensors: tensors.update({beside: torch.ones(1)}))


def test_what_belongs_to_a_module_that_the_model_does_not_have_may_be_there(tmp_path: Path):
    extra = {"vision.block.scale": torch.ones(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    with checkpoint(tmp_path, lambda tensors: tensors.update(extra)) as reader:
        assert set(reader.unexpected) == set(extra)
