"""Batcher on one rank, with a tiny random model: which tokens come out, whatever happens on the way."""

import pytest
import torch
from support.batching import NEW_TOKENS, PROMPTS, Harness
from support.families import FAMILIES, build

from elastic_moe.integrations.transformers import elasticize
from elastic_moe.membership.launch import Launch
from elastic_moe.runtime import ElasticRuntime
from elastic_moe.serving.protocol import Sampling

REQUIRED = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral")
NOT_SERVED = {
    "axk2", "bailing_hybrid", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm_moe_dsa", "granitemoehybrid",
    "hy_v4", "inkling2_text", "inkling_text", "jamba", "kimi_linear", "lfm2_moe", "mimo_v2_flash", "minimax",
    "nemotron_h", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "zaya",
}  # fmt: skip
"""Continuous batching of transformers 5.23 cannot cache their layers, or not run them (mimo_v2_flash)."""


def test_a_mixed_batch_equals_each_request_alone(model, greedy):
    harness = Harness(model)
    for name in PROMPTS:
        harness.submit(name)
    assert (harness.batcher.running, harness.batcher.waiting) == (0, 4)
    assert harness.run() == greedy
    assert harness.finish == dict.fromkeys(PROMPTS, "length")
    assert (harness.batcher.running, harness.batcher.waiting) == (0, 0)
    assert harness.batcher.tokens_generated == sum(NEW_TOKENS.values())


def test_warming_up_leaves_nothing_behind(model, greedy):
    harness = Harness(model, max_requests=4, graph_tokens=2)
    free = harness.batcher._processor.cache.compute_free_capacity()
    sizes, rehearse = [], harness.batcher._runner.rehearse
    harness.batcher._runner.rehearse = lambda model, size: (sizes.append(size), rehearse(model, size))
    harness.batcher.warm_up()
    assert sizes == [2, 4, 8, 16]
    assert harness.batcher._processor.cache.compute_free_capacity() == free
    assert (harness.batcher.running, harness.batcher.waiting, harness.tokens) == (0, 0, {})
    for name in PROMPTS:
        harness.submit(name)
    assert harness.run() == greedy


def test_a_batch_is_padded_to_a_size_that_was_warmed_up(model):
    runner = Harness(model, max_requests=4, graph_tokens=2).batcher._runner
    assert runner.maybe_pad_inputs(5, 8, False)[0] == 5
    runner.pad_inputs = True
    assert [runner.maybe_pad_inputs(n, 8, False)[0] for n in (1, 2, 3, 5, 9, 16)] == [2, 2, 4, 8, 16, 16]


def test_a_repeated_forward_writes_the_same_cache_and_picks_the_same_tokens(model, greedy):
    harness = Harness(model)
    for name in PROMPTS:
        harness.submit(name, sampling=Sampling(0.8, 0.9, seed=3) if name == "c" else Sampling())
    cache = harness.batcher._processor.cache
    for _ in range(3):
        assert harness.batcher.prepare()
        harness.batcher.forward()
        written = cache.cache_tensor.clone()  # bytes of all keys and values
        harness.batcher.forward()
        assert torch.equal(written, cache.cache_tensor)
        harness.batcher.commit()
    repeated = harness.run(num_forwards=2)
    once = Harness(model)
    once.submit("c", sampling=Sampling(0.8, 0.9, seed=3))
    assert repeated == greedy | once.run()
    assert repeated["c"] != greedy["c"]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.95, seed=11)])
def test_a_request_that_moves_goes_on_with_the_tokens_it_would_have_had(model, sampling):
    whole = Harness(model)
    whole.submit("c", sampling=sampling)
    tokens = whole.run()["c"]
    for done in (1, 7, 19):
        moved = Harness(model)
        moved.submit(
            "c",
            tokens=PROMPTS["c"] + tokens[:done],
            num_generated=done,
            max_new_tokens=NEW_TOKENS["c"] - done,
            sampling=sampling,
        )
        assert moved.run()["c"][done:] == tokens[done:]


def test_the_end_of_sequence_token_is_the_last_one(model, greedy):
    eos = greedy["c"][4]
    harness = Harness(model, eos=(eos,))
    harness.submit("c")
    assert harness.run()["c"] == greedy["c"][: greedy["c"].index(eos) + 1]
    assert harness.finish == {"c": "stop"}


def test_a_cancelled_request_frees_its_cache(model):
    harness = Harness(model, prefix_caching=False)
    cache = harness.batcher._processor.cache
    free = cache.compute_free_capacity()
    for name in ("b", "c"):
        harness.submit(name)
    for _ in range(4):
        harness.step()
    assert harness.batcher.running
    assert cache.compute_free_capacity() < free
    for name in ("b", "c", "unknown"):
        harness.batcher.cancel(name)
    assert harness.batcher.has_requests  # so that the next prepare comes, and frees
    assert not harness.step()
    assert (harness.batcher.running, harness.batcher.waiting, harness.batcher.has_requests) == (0, 0, False)
    assert cache.compute_free_capacity() == free
    assert harness.finish == {}


def test_a_request_cancelled_before_it_was_scheduled_never_runs(model):
    harness = Harness(model)
    harness.submit("a")
    harness.batcher.cancel("a")
    assert not harness.step()
    assert not harness.batcher.has_requests
    assert harness.tokens == {}


def test_a_request_of_the_same_id_replaces_the_first(model, greedy):
    harness = Harness(model)
    harness.submit("c")
    for _ in range(5):
        harness.step()
    had = harness.tokens["c"]
    assert 0 < len(had) < NEW_TOKENS["c"]
    first = len(had) - 1  # as if the last token had been lost on its way
    del had[first:]
    harness.submit("c", tokens=PROMPTS["c"] + had, num_generated=first, max_new_tokens=NEW_TOKENS["c"] - first)
    assert harness.run()["c"] == greedy["c"]
    assert harness.finish == {"c": "length"}


@pytest.mark.parametrize(("tokens", "max_new_tokens"), [([], 4), ([1], 0), ([1] * 500, 13), ([1], 512)])
def test_what_cannot_fit_is_refused(model, tokens, max_new_tokens):
    harness = Harness(model)
    with pytest.raises(ValueError, match="at most 512, the whole pages of serving\\.kv_cache_tokens=512"):
        harness.submit("a", tokens=tokens, max_new_tokens=max_new_tokens)
    assert not harness.batcher.has_requests


def test_what_is_longer_than_the_model_takes_is_refused(model):
    longest = model.config.max_position_embeddings
    harness = Harness(model, kv_cache_tokens=4 * longest)
    with pytest.raises(ValueError, match=f"at most {longest}"):
        harness.submit("a", tokens=[1] * longest, max_new_tokens=1)
    with pytest.raises(ValueError, match="at most 40"):
        Harness(model, max_model_len=40).submit("a", tokens=[1] * 32, max_new_tokens=9)


def test_a_long_prompt_takes_few_tokens_of_a_step_while_others_decode(model, greedy):
    harness = Harness(model, max_batch_tokens=16, prefill_tokens=3)
    sizes: list[int] = []
    lay_out = harness.batcher._processor.inputs_and_outputs.prepare_batch_tensors

    def counted(requests_in_batch: list, *args: object, **named: object) -> None:
        sizes.append(sum(future.query_length for future in requests_in_batch))
        lay_out(requests_in_batch, *args, **named)

    harness.batcher._processor.inputs_and_outputs.prepare_batch_tensors = counted
    harness.submit("b")
    while "b" not in harness.tokens:
        harness.step()
    assert sizes == [16, 15], "nobody decodes"
    sizes.clear()
    harness.submit("c")
    found = harness.run()
    assert sizes[:4] == [4, 4, 4, 4], "one token of b, three of the prompt"
    assert sizes[4] == 5, "b has ended: the rest at once"
    assert {name: found[name] for name in "bc"} == {name: greedy[name] for name in "bc"}


def test_only_whole_pages_count(model):
    harness = Harness(model, kv_cache_tokens=63)
    with pytest.raises(ValueError, match="at most 56, the whole pages of serving\\.kv_cache_tokens=63"):
        harness.submit("a", tokens=[4] * 40, max_new_tokens=17)
    harness.submit("a", tokens=[4] * 40, max_new_tokens=16)
    assert len(harness.run()["a"]) == 16


def test_the_longest_request_that_fits_runs_to_its_end(model):
    harness = Harness(model, kv_cache_tokens=64)
    harness.submit("a", tokens=[4] * 40, max_new_tokens=24)
    assert len(harness.run()["a"]) == 24


def test_requests_that_do_not_fit_together_take_turns(model, greedy):
    harness = Harness(model, kv_cache_tokens=48)
    for name in PROMPTS:
        harness.submit(name)
    assert harness.run() == greedy


def test_more_requests_than_places_wait(model, greedy):
    harness = Harness(model, max_requests=2)
    for name in PROMPTS:
        harness.submit(name)
    harness.step()
    assert harness.batcher.running <= 2
    assert harness.batcher.running + harness.batcher.waiting >= 3  # "d" may have its one token already
    assert harness.run() == greedy


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_shared_beginning_changes_no_token(model, greedy, prefix_caching):
    harness = Harness(model, prefix_caching=prefix_caching)
    harness.submit("b")
    harness.run()
    longer = PROMPTS["b"] + greedy["b"]
    harness.submit("b", tokens=longer, num_generated=5, max_new_tokens=8)
    harness.finish.clear()
    again = harness.run()["b"]
    fresh = Harness(model, prefix_caching=False)
    fresh.submit("b", max_new_tokens=13)
    assert again == fresh.run()["b"]


# Attention of all the kinds that can be cached: grouped queries, sinks and sliding windows, latent with wide keys.
@pytest.mark.parametrize(
    "family",
    [*REQUIRED, *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in {*REQUIRED, *NOT_SERVED})],
)
def test_families(family):
    alone = build(FAMILIES[family]())
    prompts = {name: PROMPTS[name] for name in ("a", "b", "c")}
    wanted = {
        name: alone.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for name, prompt in prompts.items()
    }
    runtime = ElasticRuntime.join(Launch(), device=torch.device("cpu"))
    harness = Harness(elasticize(build(FAMILIES[family]()), runtime).eval())
    for name in prompts:
        harness.submit(name, max_new_tokens=8)
    assert harness.run() == wanted
    runtime.close()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("jamba", "JambaForCausalLM cannot be served by continuous batching: Invalid layer"),
        (
            "mimo_v2_flash",
            "MiMoV2FlashForCausalLM cannot be served by continuous batching: model.layers.0",
        ),
    ],
)
def test_layers_that_cannot_be_cached_are_refused(family: str, reason: str):
    runtime = ElasticRuntime.join(Launch(), device=torch.device("cpu"))
    model = elasticize(build(FAMILIES[family]()), runtime)
    with pytest.raises(ValueError, match=reason):
        Harness(model)
    runtime.close()
