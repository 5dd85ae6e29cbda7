"""What is assumed of transformers beyond its public API: a version that breaks it fails here, and says where to look.

The public API says nothing of cutting a generation step in three, nor of converting a checkpoint one expert at a
time. serving/engine/batching.py, weights/ and experts/slots.py therefore rest on the names below.
"""

import inspect
from collections.abc import Callable

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from support.families import FAMILIES, build, build_on_meta, experts_of
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import (
    GenerationOutput,
    RequestState,
    RequestStatus,
    create_warmup_future_states,
)

BATCHING = "elastic_moe/serving/engine/batching.py"
CONVERSION = "elastic_moe/weights/conversion.py"
MATERIALIZE = "elastic_moe/weights/materialize.py"
SLOTS = "elastic_moe/experts/slots.py and elastic_moe/integrations/transformers.py"


def changed(what: str, look_at: str) -> str:
    return f"transformers {transformers.__version__} changed {what}: look at {look_at}"


@pytest.mark.parametrize(
    ("function", "parameters", "look_at"),
    [
        (ContinuousBatchingManager.__init__, "self model generation_config continuous_batching_config", BATCHING),
        (ContinuousBatchingManager._create_batch_processor, "self", BATCHING),
        (ContinuousBatchingManager.cancel_request, "self request_id", BATCHING),
        (ContinuousBatchProcessor.prepare_next_batch, "self", BATCHING),
        (ContinuousBatchProcessor._generation_step, "self model", BATCHING),
        (ContinuousBatchProcessor.update_batch, "self", BATCHING),
        (ContinuousBatchProcessor.has_pending_requests, "self", BATCHING),
        (
            ModelRunner.__init__,
            "self logit_processor cb_config inputs_and_outputs cache do_sample return_logprobs",
            BATCHING,
        ),
        (ModelRunner._sample, "self scores output_ids", BATCHING),
        (ModelRunner.maybe_pad_inputs, "self num_q_tokens max_kv_read use_decode_fast_path", BATCHING),
        (create_warmup_future_states, "num status num_q_tokens max_kv_read cache", BATCHING),
        (OutputRouter.__init__, "self", BATCHING),
        (OutputRouter.deliver, "self output", BATCHING),
        (OutputRouter.deliver_batch, "self outputs", BATCHING),
        (RequestState.to_generation_output, "self", BATCHING),
        (GenerationOutput.is_finished, "self", BATCHING),
        (get_model_conversion_mapping, "model", CONVERSION),
        (apply_renamings, "source_key weight_renamings", CONVERSION),
        (
            rename_source_key,
            "source_key weight_renamings weight_converters base_model_prefix meta_state_dict",
            CONVERSION,
        ),
        (dot_natural_key, "s", CONVERSION),
        (build_glob_alternation, "globs", CONVERSION),
        (WeightConverter.convert, "self layer_name model config", CONVERSION),
        (PreTrainedModel._get_dtype_plan, "self dtype", CONVERSION),
        (PreTrainedModel.tie_weights, "self missing_keys recompute_mapping", MATERIALIZE),
        (PreTrainedModel.initialize_weights, "self", MATERIALIZE),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures(function: Callable, parameters: str, look_at: str):
    """The first parameters are these; whatever follows has a default."""
    found = inspect.signature(function).parameters
    names = parameters.split()
    assert list(found)[: len(names)] == names, changed(function.__qualname__, look_at)
    rest = list(found.values())[len(names) :]
    needed = [p.name for p in rest if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert not needed, changed(f"{function.__qualname__}: it needs {needed}", look_at)


def test_adding_a_request():
    found = inspect.signature(ContinuousBatchingManager.add_request).parameters
    wanted = {"input_ids", "request_id", "max_new_tokens", "streaming", "eos_token_id"}
    assert wanted <= set(found), changed("add_request", BATCHING)


def test_the_batching_config_has_the_switches_that_are_set():
    wanted = {
        "page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch", "allow_block_sharing",
        "use_async_batching", "use_cuda_graph", "auto_switch_to_flash", "disable_nccl_graph_mixing", "seed",
    }  # fmt: skip
    found = inspect.signature(ContinuousBatchingConfig).parameters
    assert wanted <= set(found), changed("ContinuousBatchingConfig", BATCHING)


class Outputs(OutputRouter):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[GenerationOutput] = []

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self.seen += outputs


def test_a_step_has_three_parts_in_this_order():
    """prepare schedules, _generation_step runs and samples and publishes nothing, update_batch publishes."""
    model = build(FAMILIES["qwen3_moe"]())
    config = ContinuousBatchingConfig(
        page_size=8, num_blocks=16, max_batch_tokens=16, max_requests_per_batch=4, use_async_batching=False,
        use_cuda_graph=False, auto_switch_to_flash=False,
    )  # fmt: skip
    manager = ContinuousBatchingManager(model, GenerationConfig(do_sample=False, eos_token_id=-1), config)
    outputs = manager.output_router = Outputs()
    processor = manager._create_batch_processor()
    assert processor.output_router is outputs, changed("where outputs go", BATCHING)
    sampled = []

    class Runner(ModelRunner):
        def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
            futures = self.inputs_and_outputs.requests_in_batch
            sampled.append([(f.state.request_id, f.has_new_token, tuple(f.state.generated_tokens)) for f in futures])
            super()._sample(scores, output_ids)

    like = processor.model_runner
    arguments = {name: getattr(like, name) for name in ("logit_processor", "cb_config", "inputs_and_outputs", "cache")}
    processor.model_runner = Runner(**arguments, do_sample=False, return_logprobs=False)

    manager.add_request([5] * 20, request_id="long", max_new_tokens=2, streaming=True, eos_token_id=[])
    assert manager.input_queue.qsize() == 1
    assert not processor.has_pending_requests()
    assert processor.prepare_next_batch() is True
    assert manager.input_queue.empty()
    assert list(processor.scheduler.active_requests) == ["long"]
    assert not processor.scheduler.waiting_requests
    processor._generation_step(model)
    assert outputs.seen == []
    processor.update_batch()
    assert outputs.seen == [], "16 of 20 prompt tokens are in: there is no token yet"

    assert processor.prepare_next_batch()
    processor._generation_step(model)
    processor._generation_step(model)
    assert outputs.seen == []
    processor.update_batch()
    (output,) = outputs.seen
    assert (output.request_id, len(output.generated_tokens), output.is_finished()) == ("long", 1, False)
    assert sampled == [[("long", False, ())], *[[("long", True, ())]] * 2], changed("what _sample sees", BATCHING)

    manager.cancel_request("long")
    assert not manager.cancel_queue.empty()
    assert processor.prepare_next_batch() is False
    assert not processor.has_pending_requests()
    assert outputs.seen == [output], "the end of a cancelled request is not told"


def test_requests_end_in_these_states():
    ended = [status for status in RequestStatus if status >= RequestStatus.FINISHED]
    assert ended == [RequestStatus.FINISHED, RequestStatus.FAILED], changed("RequestStatus", BATCHING)


def test_a_request_pushed_out_of_the_cache_keeps_its_position():
    """The sampling position is len(initial) + len(generated) - len(prompt), also after transformers restarts it."""
    state = RequestState("a", [1, 2, 3], max_new_tokens=8)
    state.generated_tokens = [4, 5]
    again = state.create_equivalent_initial_request()
    again.generated_tokens = [6]
    assert len(again.initial_tokens) + len(again.generated_tokens) - 3 == 3, changed("restarted requests", BATCHING)
    assert again.to_generation_output().generated_tokens == [4, 5, 6], changed("restarted requests", BATCHING)


def test_the_conversion_mapping_has_these_parts():
    model = build_on_meta(FAMILIES["qwen3_moe"]())
    mapping = get_model_conversion_mapping(model)
    assert all(isinstance(entry, WeightRenaming | WeightConverter) for entry in mapping), changed("mapping", CONVERSION)
    (gate_up,) = [entry for entry in mapping if "gate_up_proj" in "".join(entry.target_patterns)]
    assert isinstance(gate_up, WeightConverter)
    assert isinstance(gate_up.operations[0], MergeModulelist), changed("how experts are stacked", CONVERSION)
    assert gate_up.operations[0].dim == 0
    assert [pattern.count("*.") for pattern in gate_up.source_patterns] == [1, 1], changed("patterns", CONVERSION)
    assert hasattr(gate_up, "collected_tensors"), changed("WeightConverter", CONVERSION)
    targets = model.state_dict()
    name = "model.layers.0.mlp.experts.3.gate_proj.weight"
    target, pattern = rename_source_key(name, [], [gate_up], model.base_model_prefix, targets)
    assert target == "model.layers.0.mlp.experts.gate_up_proj", changed("rename_source_key", CONVERSION)
    assert pattern in gate_up.source_patterns, changed("rename_source_key", CONVERSION)


def test_names_sort_by_number():
    assert sorted(["a.10.b", "a.9.b"], key=dot_natural_key) == ["a.9.b", "a.10.b"], changed("the order", CONVERSION)


def test_a_glob_alternation_tells_which_glob_matched():
    pattern, globs, _ = build_glob_alternation(["a.*.b", "norm"])
    match = pattern.search("x.norm.y")
    assert match is not None
    assert globs[match.lastgroup] == "norm", changed("build_glob_alternation", CONVERSION)


def test_a_model_tells_of_its_tied_weights():
    config = FAMILIES["qwen3_moe"]()
    config.tie_word_embeddings = True
    tied = build_on_meta(config).all_tied_weights_keys
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}, changed("all_tied_weights_keys", MATERIALIZE)


def test_initialisation_leaves_marked_tensors_alone():
    model = build_on_meta(FAMILIES["qwen3_moe"]()).to_empty(device="cpu")
    for tensor in model.parameters():
        tensor.detach().fill_(7.0)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor._is_hf_initialized = name != "lm_head.weight"
    model.initialize_weights()
    differs = [name for name, tensor in model.named_parameters() if not torch.equal(before[name], tensor)]
    assert differs == ["lm_head.weight"], changed("_is_hf_initialized", MATERIALIZE)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_the_experts_interface(family: str):
    for experts in experts_of(build_on_meta(FAMILIES[family]())).values():
        for name in ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"):
            assert hasattr(experts, name), changed(f"{type(experts).__name__}.{name}", SLOTS)
        parameters = list(inspect.signature(type(experts).forward).parameters)  # gpt_oss has other names
        assert parameters[:2] == ["self", "hidden_states"], changed("experts' forward", SLOTS)
        assert len(parameters) == 4, changed("experts' forward", SLOTS)
        assert len(inspect.signature(experts._apply_gate).parameters) == 1, changed("_apply_gate", SLOTS)


def test_safetensors_lists_names_by_offset(tmp_path):
    save_file({"b": torch.zeros(2), "a": torch.zeros(3)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert set(file.offset_keys()) == {"a", "b"}, changed(
            "(safetensors) offset_keys", "elastic_moe/weights/shards.py"
        )
