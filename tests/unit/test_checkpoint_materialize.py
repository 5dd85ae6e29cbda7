"""Giving memory to a model from the meta device: nothing is initialised in vain, and tied weights end up tied."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, build, build_on_meta, layouts_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from elastic_moe.weights.checkpoint import CheckpointReader
from elastic_moe.weights.materialize import materialize, set_tensor

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(folder: Path, model: PreTrainedModel) -> None:
    """Dense tensors from the checkpoint, experts zero."""
    layouts = layouts_of(model)
    with CheckpointReader(folder, model, layouts) as reader:
        for name, tensor in reader.read_dense():
            set_tensor(model, name, tensor)
        for module, layout in layouts.items():
            for name, shape in zip(layout.names, layout.shapes, strict=True):
                set_tensor(model, f"{module}.{name}", torch.zeros(layout.num_experts, *shape))
        materialize(model, "cpu", reader.missing)


def test_no_random_numbers_are_drawn() -> None:
    model = build_on_meta(FAMILIES["qwen3_moe"]())
    before = torch.get_rng_state()
    materialize(model, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_real_tensors_stay() -> None:
    model = build_on_meta(FAMILIES["deepseek_v3"]())
    head = torch.full((96, 32), 3.0)
    set_tensor(model, HEAD, head)
    materialize(model, "cpu")
    assert model.get_parameter(HEAD).data_ptr() == head.data_ptr()
    assert bool((head == 3).all())
    model.lm_head.weight.requires_grad_(False)
    set_tensor(model, HEAD, torch.zeros(96, 32))
    assert not model.lm_head.weight.requires_grad


def test_set_tensor_of_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'lm_head' has no parameter or buffer 'bias'"):
        set_tensor(build_on_meta(FAMILIES["qwen3_moe"]()), "lm_head.bias", torch.zeros(1))


@pytest.mark.parametrize("present", [{EMBED}, {HEAD}, {EMBED, HEAD}])
def test_tied_weights(present: set[str], tmp_path: Path) -> None:
    config = FAMILIES["qwen3_moe"]()
    build(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    absent = {EMBED, HEAD} - present
    save_file({k: v for k, v in tensors.items() if k not in absent}, tmp_path / "model.safetensors", {"format": "pt"})
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = build_on_meta(config)
    load(tmp_path, model)
    for name in (EMBED, HEAD):
        assert torch.equal(model.get_parameter(name), reference.get_parameter(name))
    tied = model.get_parameter(EMBED) is model.get_parameter(HEAD)
    assert tied == (reference.get_parameter(EMBED) is reference.get_parameter(HEAD)) == bool(absent)


def test_tied_weights_without_data_share_memory() -> None:
    config = FAMILIES["qwen3_moe"]()
    config.tie_word_embeddings = True
    model = build_on_meta(config)
    materialize(model, "cpu")
    assert model.get_parameter(EMBED) is model.get_parameter(HEAD)


def test_what_is_left_on_the_meta_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES["qwen3_moe"]()
    config.tie_word_embeddings = True
    model = build_on_meta(config)
    monkeypatch.setattr(model, "tie_weights", lambda **_: None)
    with pytest.raises(RuntimeError, match=f"1 tensors are still on the meta device: {HEAD}"):
        materialize(model, "cpu")


def test_what_may_be_missing_is_initialised(tmp_path: Path) -> None:
    build(FAMILIES["qwen3_moe"]()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = build_on_meta(FAMILIES["qwen3_moe"]())
    model._keys_to_ignore_on_load_missing = {r"^model\.norm\."}
    load(tmp_path, model)
    assert torch.equal(model.get_parameter("model.norm.weight"), torch.ones(32))
    assert torch.equal(model.get_parameter(HEAD), tensors[HEAD])
