"""Requests that fail the batch they are in: who ends, who goes on, and when it is the rank that is broken."""

import pytest
import torch
from support.batching import Harness

from elastic_moe.serving.engine.batching import BROKEN_AFTER

POISON = 77


@pytest.fixture
def poisonous(model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A model that cannot take a token with this id; the sizes of the batches that it failed in."""
    failed: list[int] = []
    right = model.forward

    def forward(*arguments, **keywords):
        if (keywords["input_ids"] == POISON).any():
            failed.append(keywords["input_ids"].numel())
            raise IndexError("a token that nobody can take\nand more of it")
        return right(*arguments, **keywords)

    monkeypatch.setattr(model, "forward", forward)
    return failed


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_request_that_fails_its_batch_ends_alone_and_its_neighbours_go_on(model, greedy, poisonous, prefix_caching):
    harness = Harness(model, prefix_caching=prefix_caching, max_batch_tokens=64)
    free = harness.batcher._processor.cache.compute_free_capacity()
    for name in ("a", "b"):
        harness.submit(name)
    for _ in range(2):
        harness.step()
    harness.submit("d", tokens=[3, POISON, 4])
    harness.submit("c")
    assert harness.run() == greedy | {"d": []}
    assert harness.finish == {"a": "length", "b": "length", "c": "length", "d": "error"}
    assert harness.errors == {"d": "the model failed: a token that nobody can take"}
    assert len(poisonous) == 2, "once with the others, once alone"
    assert poisonous[1] == 3
    if not prefix_caching:
        assert harness.batcher._processor.cache.compute_free_capacity() == free
    assert (harness.batcher.running, harness.batcher.waiting, harness.batcher.has_requests) == (0, 0, False)


def test_several_poisonous_ones_end_and_the_others_do_not(model, greedy, poisonous):
    harness = Harness(model, max_batch_tokens=64)
    for name in ("x", "y", "z"):
        harness.submit("a", request_id=name, tokens=[POISON, 4])
        harness.submit({"x": "a", "y": "b", "z": "c"}[name])
    assert {name: tokens for name, tokens in harness.run().items() if tokens} == {n: greedy[n] for n in "abc"}
    assert sorted(harness.errors) == ["x", "y", "z"]


def test_a_request_alone_fails_at_once(model, poisonous):
    harness = Harness(model)
    harness.submit("a", tokens=[POISON], num_generated=0)
    harness.run()
    assert harness.errors.keys() == {"a"}
    assert len(poisonous) == 1


def test_who_comes_or_goes_in_a_trial_has_its_turn(model, greedy, poisonous):
    harness = Harness(model, max_batch_tokens=64)
    for name in ("a", "b"):
        harness.submit(name)
    harness.submit("d", tokens=[POISON])
    harness.step()  # fails
    harness.submit("c")
    harness.batcher.cancel("b")
    assert harness.batcher.waiting >= 1
    found = harness.run()
    assert found == {"a": greedy["a"], "c": greedy["c"], "d": []}


def test_a_request_under_suspicion_runs_alone_until_its_next_token(model, greedy):
    harness = Harness(model, max_batch_tokens=64)
    for name in ("a", "b"):
        harness.submit(name)
    harness.step()
    harness.submit("c", alone=True)
    had = {name: list(tokens) for name, tokens in harness.tokens.items()}
    harness.step()
    assert harness.batcher.running == 1
    assert harness.tokens == had | {"c": greedy["c"][:1]}
    assert harness.run() == {name: greedy[name] for name in ("a", "b", "c")}


def test_what_cannot_be_scheduled_fails_the_requests_not_the_rank(model, greedy, monkeypatch):
    harness = Harness(model)
    processor = harness.batcher._processor
    right = processor.prepare_next_batch

    def prepare() -> bool:
        ready = right()
        if any(name.startswith("d/") for name in processor.scheduler.active_requests):
            raise RuntimeError("No requests can be scheduled and no requests can be offloaded.")
        return ready

    monkeypatch.setattr(processor, "prepare_next_batch", prepare)
    for name in ("a", "d", "b"):
        harness.submit(name)
    assert harness.run() == {"a": greedy["a"], "b": greedy["b"], "d": []}
    assert harness.errors == {"d": "the model failed: No requests can be scheduled and no requests can be offloaded."}


def test_a_rank_that_fails_whatever_it_runs_ends(model, monkeypatch):
    def broken(*_arguments, **_keywords):
        raise ZeroDivisionError

    monkeypatch.setattr(model, "forward", broken)
    harness = Harness(model)
    for number in range(BROKEN_AFTER):
        harness.submit("a", request_id=f"{number}")
        harness.run()
    harness.submit("a")
    with pytest.raises(ZeroDivisionError):
        harness.run()


def test_a_broken_device_ends_the_rank(model, monkeypatch):
    def broken(*_arguments, **_keywords):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered", 0)

    monkeypatch.setattr(model, "forward", broken)
    harness = Harness(model)
    harness.submit("a")
    with pytest.raises(torch.AcceleratorError):
        harness.run()
