"""What the reader reads, and what it says when a checkpoint or an argument is not right."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, build, build_on_meta, experts_of, layouts_of
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose, WeightConverter

from elastic_moe.errors import CheckpointError
from elastic_moe.experts.layout import ExpertLayout
from elastic_moe.weights.checkpoint import CheckpointReader
from elastic_moe.weights.shards import Shards

Tensors = dict[str, torch.Tensor]
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(FAMILIES["qwen3_moe"]()).save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reader_of(folder: Path, family: str = "qwen3_moe") -> CheckpointReader:
    model = build_on_meta(FAMILIES[family]())
    return CheckpointReader(folder, model, layouts_of(model))


def empty_expert(layout: ExpertLayout) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype) for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)]


def test_layout_of_a_module() -> None:
    model = build_on_meta(FAMILIES["gpt_oss"]())
    layout = ExpertLayout.of_module(model.get_submodule(EXPERTS), torch.bfloat16)
    assert layout.names == ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    assert layout.shapes == ((32, 96), (96,), (48, 32), (32,))
    assert layout.num_experts == 6
    assert set(layout.dtypes) == {torch.bfloat16}
    assert layout.num_bytes == 2 * (32 * 96 + 96 + 48 * 32 + 32)
    with pytest.raises(ValueError, match="num_experts"):
        ExpertLayout.of_module(torch.nn.Linear(2, 2))
    bare = torch.nn.Module()
    bare.num_experts = 3
    with pytest.raises(ValueError, match="leading dimension of 3"):
        ExpertLayout.of_module(bare)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "inkling_text"])
def test_only_the_bytes_of_one_expert_are_read(family: str, tmp_path: Path) -> None:
    build(FAMILIES[family]()).save_pretrained(tmp_path)
    with reader_of(tmp_path, family) as reader:
        assert reader.bytes_read == 0
        layout = layouts_of(build_on_meta(FAMILIES[family]()))[EXPERTS]
        assert reader.bytes_per_expert(EXPERTS) == layout.num_bytes
        assert reader.read_expert(EXPERTS, 5, empty_expert(layout)) == layout.num_bytes == reader.bytes_read
        dense = sum(tensor.nbytes for _, tensor in reader.read_dense())
        assert reader.bytes_total_dense == dense == reader.bytes_read - layout.num_bytes


def test_bytes_are_those_of_the_checkpoint_dtype(folder: Path) -> None:
    edit(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    with reader_of(folder) as reader:
        out = empty_expert(layouts_of(build_on_meta(FAMILIES["qwen3_moe"]()))[EXPERTS])
        assert reader.read_expert(EXPERTS, 1, out) * 2 == sum(t.nbytes for t in out)
        stored = load_file(folder / "model.safetensors")
        assert torch.equal(out[1], stored[f"{EXPERTS}.1.down_proj.weight"].float())
        assert all(tensor.dtype == torch.float32 for _, tensor in reader.read_dense())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_what_will_be_read_is_what_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.arange(24).reshape(4, 6) % 2).to(dtype)
    save_file({"some": tensor, "other": torch.ones(3)}, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    assert (shards.shape("some"), shards.num_bytes("some"), shards.num_bytes("some", 2)) == (
        (4, 6),
        tensor.nbytes,
        tensor[2].nbytes,
    )
    assert torch.equal(shards.read("some").float(), tensor.float())
    assert shards.bytes_read == tensor.nbytes
    assert torch.equal(shards.read("some", 2).float(), tensor[2:3].float())
    assert shards.bytes_read == tensor.nbytes + tensor[2].nbytes
    shards.close()


def test_dense_tensors_own_their_memory(folder: Path) -> None:
    with reader_of(folder) as reader:
        tensors = dict(reader.read_dense())
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    with (folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_dense_tensors_that_are_had_already_are_left_out(folder: Path) -> None:
    """Of the first, of one in the middle: the others come, in their order, and nothing else is read."""
    with reader_of(folder) as reader:
        names, total = reader.dense_names(), reader.bytes_total_dense
        sizes = {name: tensor.nbytes for name, tensor in reader.read_dense()}
    but = {names[0], names[4]}
    with reader_of(folder) as reader:
        assert [name for name, _ in reader.read_dense(but=but)] == [name for name in names if name not in but]
        assert reader.bytes_read == total - sizes[names[0]] - sizes[names[4]]


def test_dense_in_file_order(folder: Path) -> None:
    edit(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}))
    with reader_of(folder) as reader:
        names = reader.dense_names()
    assert names[-1] == "lm_head.weight"  # safetensors puts the wider dtypes first, then goes by name
    assert list(names[:-1]) == sorted(names[:-1])


def test_unexpected_tensors_are_listed_only(folder: Path) -> None:
    extra = {"model.layers.9.mlp.experts.0.up_proj.weight": torch.ones(1), "odd": torch.ones(1)}
    edit(folder, lambda t: t.update(extra))
    with reader_of(folder) as reader:
        assert set(reader.unexpected) == set(extra)


def test_of_two_ways_to_make_a_tensor_the_first_is_taken(folder: Path) -> None:
    """Numbered experts come first, by name; the fused tensor beside them is of no use, and neither is read for it."""
    fused, last = f"{EXPERTS}.down_proj", "model.layers.1.mlp.experts.down_proj"
    edit(folder, lambda t: t.update({fused: torch.ones(6, 32, 16), last: torch.ones(6, 32, 16)}))
    stored = load_file(folder / "model.safetensors")
    layout = layouts_of(build_on_meta(FAMILIES["qwen3_moe"]()))[EXPERTS]
    with reader_of(folder) as reader:
        assert set(reader.unexpected) == {fused, last}
        assert reader.bytes_per_expert(EXPERTS) == layout.num_bytes
        out = empty_expert(layout)
        reader.read_expert(EXPERTS, 2, out)
    assert torch.equal(out[1], stored[f"{EXPERTS}.2.down_proj.weight"])


@pytest.mark.parametrize(("num_missing", "shown"), [(4, "q_proj.weight$"), (5, "q_proj.weight, ...$")])
def test_few_of_the_missing_tensors_are_named(folder: Path, num_missing: int, shown: str) -> None:
    attention = "model.layers.0.self_attn"
    names = [f"{attention}.{name}_proj.weight" for name in ("k", "o", "q", "v")] + ["model.norm.weight"]
    names = [*names[:1], f"{attention}.k_norm.weight", *names[1:]]
    edit(folder, lambda t: [t.pop(name) for name in sorted(names)[:num_missing]])
    with pytest.raises(CheckpointError, match=f"lacks {num_missing} tensors of the model: {attention}.k_norm.*{shown}"):
        reader_of(folder)


def test_what_any_of_the_models_patterns_allows_may_be_missing(folder: Path) -> None:
    names = {"model.norm.weight", "model.layers.1.self_attn.q_proj.weight"}
    edit(folder, lambda t: [t.pop(name) for name in names])
    model = build_on_meta(FAMILIES["qwen3_moe"]())
    model._keys_to_ignore_on_load_missing = {r"model\.norm", "q_proj"}
    with CheckpointReader(folder, model, layouts_of(model)) as reader:
        assert reader.missing == names


def test_tied_head_may_be_absent(tmp_path: Path) -> None:
    config = FAMILIES["qwen3_moe"]()
    config.tie_word_embeddings = True
    build(config).save_pretrained(tmp_path)
    model = build_on_meta(config)
    with CheckpointReader(tmp_path, model, layouts_of(model)) as reader:
        assert "lm_head.weight" not in reader.dense_names()
        assert reader.missing == frozenset()
    edit(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors of the model: lm_head.weight, model.embed_tokens"):
        CheckpointReader(tmp_path, model, layouts_of(model))


def test_arguments_are_checked(folder: Path) -> None:
    model = build_on_meta(FAMILIES["qwen3_moe"]())
    layouts = layouts_of(model)
    with CheckpointReader(folder, model, layouts) as reader:
        out = empty_expert(layouts[EXPERTS])
        with pytest.raises(ValueError, match=r"'nowhere' is not an experts module.*: model\.layers\.0"):
            reader.read_expert("nowhere", 0, out)
        for expert in (-1, 6):
            with pytest.raises(ValueError, match=r"not in 0\.\.5"):
                reader.read_expert(EXPERTS, expert, out)
        with pytest.raises(ValueError, match="out has shapes"):
            reader.read_expert(EXPERTS, 0, out[::-1])
    layout = layouts[EXPERTS]
    wrong = ExpertLayout(layout.names, layout.shapes, layout.dtypes, 7)
    with pytest.raises(ValueError, match="the model has"):
        CheckpointReader(folder, model, {EXPERTS: wrong})


FLAWS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing expert": (
        lambda t: t.pop(f"{EXPERTS}.3.up_proj.weight"),
        "model.layers.0.mlp.experts.gate_up_proj: expert 3 of 6 is missing .*up_proj",
    ),
    "one expert too many": (
        lambda t: t.update({f"{EXPERTS}.6.down_proj.weight": torch.ones(32, 16)}),
        "down_proj: expert 6 of 6 is one too many",
    ),
    "no gate at all": (
        lambda t: [t.pop(f"{EXPERTS}.{e}.gate_proj.weight") for e in range(6)],
        r"gate_up_proj cannot be made of .*up_proj.weight and 5 more, nothing for 'mlp.experts.\*.gate_proj.weight'",
    ),
    "no tensor of a layer": (
        lambda t: [t.pop(f"{EXPERTS}.{e}.down_proj.weight") for e in range(6)],
        f"lacks 1 tensors of the model: {EXPERTS}.down_proj",
    ),
    "missing dense": (lambda t: t.pop("model.norm.weight"), "lacks 1 tensors of the model: model.norm.weight"),
    "wrong dense shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(31)}),
        r"model.norm.weight has shape \(31,\) in the checkpoint \(model.norm.weight\), .*needs \(32,\)",
    ),
    "wrong expert shape": (
        lambda t: t.update({f"{EXPERTS}.{e}.down_proj.weight": torch.ones(32, 15) for e in range(6)}),
        r"down_proj has shape \(1, 32, 15\) .*needs \(1, 32, 16\)",
    ),
    "one expert of another shape": (
        lambda t: t.update({f"{EXPERTS}.4.down_proj.weight": torch.ones(32, 15)}),
        r"down_proj: experts differ in shape",
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_flaws_of_a_checkpoint(flaw: str, folder: Path) -> None:
    change, message = FLAWS[flaw]
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        reader_of(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.001, 0.0])
def test_truncated_file(keep: float, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        reader_of(folder)


def test_an_expert_may_never_be_missing(folder: Path) -> None:
    edit(folder, lambda t: [t.pop(f"{EXPERTS}.{e}.down_proj.weight") for e in range(6)])
    model = build_on_meta(FAMILIES["qwen3_moe"]())
    model._keys_to_ignore_on_load_missing = {"down_proj"}
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        CheckpointReader(folder, model, layouts_of(model))


def test_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*: neither"):
        reader_of(folder)
    build(FAMILIES["qwen3_moe"]()).save_pretrained(folder, max_shard_size="30KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"1 of {len(shards)} shards are not in .*: {shards[1].name}"):
        reader_of(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(CheckpointError, match="cannot read the weight map"):
        reader_of(folder)


def test_quantised_checkpoint(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised checkpoints are not supported yet: fp8"):
        reader_of(folder)


def interleaved(experts: torch.Tensor, inverse: bool) -> torch.Tensor:
    return Interleave(0, inverse=inverse).convert({"x": experts}, ["x"], ["x"])["x"]


CONVERTERS = {
    "transposed": (Transpose(1, 2), lambda t: t.transpose(1, 2), 1),
    # one expert never has the shape of the whole parameter that check_dims compares with
    "transposed when needed": (Transpose(1, 2, check_dims=True), lambda t: t.transpose(1, 2), 1),
    "transposed already": (Transpose(1, 2, check_dims=True), lambda t: t, 1),
    # act on the expert dimension: all experts are read for one
    "experts last": (Transpose(0, 2), lambda t: t.transpose(0, 2), 6),
    "experts in another order": (Interleave(0), lambda t: interleaved(t, inverse=True), 6),
}


@pytest.mark.parametrize("case", CONVERTERS)
def test_converters_of_stacked_tensors(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, inverse, factor = CONVERTERS[case]
    mapping = [
        WeightConverter("mlp.experts.stacked_down", "mlp.experts.down_proj", [operation]),
        WeightConverter(
            ["mlp.experts.stacked_gate", "mlp.experts.stacked_up"], "mlp.experts.gate_up_proj", [Concatenate(dim=1)]
        ),
    ]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def stack(tensors: Tensors) -> None:
        for name in [name for name in tensors if "experts.0." in name]:
            whole = torch.stack([tensors.pop(name.replace("experts.0.", f"experts.{e}.")) for e in range(6)])
            block, kind = name.removesuffix("_proj.weight").split("experts.0.")
            if kind == "down":
                whole = inverse(whole)
            tensors[f"{block}experts.stacked_{kind}"] = whole.contiguous()

    edit(folder, stack)
    monkeypatch.setattr("elastic_moe.weights.conversion.get_model_conversion_mapping", lambda _: mapping)
    model = build_on_meta(FAMILIES["qwen3_moe"]())
    layouts = layouts_of(model)
    with CheckpointReader(folder, model, layouts) as reader:
        for module, layout in layouts.items():
            for expert in range(6):
                out = empty_expert(layout)
                count = reader.read_expert(module, expert, out)
                assert count == out[0].nbytes + factor * out[1].nbytes == reader.bytes_per_expert(module)
                for name, tensor in zip(layout.names, out, strict=True):
                    assert torch.equal(tensor, reference.get_parameter(f"{module}.{name}")[expert])


def test_converter_that_reorders_numbered_experts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [MergeModulelist(0), Interleave(0)]
    mapping = [WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", steps)]
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_parameter(f"{EXPERTS}.down_proj")
    stored = load_file(folder / "model.safetensors")
    stored = {name: tensor for name, tensor in stored.items() if not ("experts" in name and "down" not in name)}
    model = build_on_meta(FAMILIES["qwen3_moe"]())
    for module in experts_of(model).values():
        del module.gate_up_proj
    save_file(stored, folder / "model.safetensors")
    monkeypatch.setattr("elastic_moe.weights.conversion.get_model_conversion_mapping", lambda _: mapping)
    expected = interleaved(merged.detach(), inverse=False)
    with CheckpointReader(folder, model, layouts_of(model)) as reader:
        for expert in range(6):
            out = torch.empty(32, 16)
            reader.read_expert(EXPERTS, expert, [out])
            assert torch.equal(out, expected[expert])
