"""Sampling is a function of logits, seed and position; nothing else."""

import pytest
import torch

from elastic_moe.serving.engine.sampling import noise, pick
from elastic_moe.serving.protocol import Sampling


def test_noise_is_exponential_and_reproducible():
    values = noise(7, 3, 4000)
    assert torch.equal(values, noise(7, 3, 4000))
    assert values.min() > 0
    assert abs(values.mean() - 1) < 0.05
    assert len({float(noise(seed, position, 1)) for seed in range(50) for position in range(4)}) == 200


def test_seeds_of_any_size_and_sign():
    assert torch.equal(noise(2**64 + 5, 3, 10), noise(5, 3, 10))
    assert torch.equal(noise(-1, 3, 10), noise(2**64 - 1, 3, 10))
    assert len({float(noise(seed, 3, 1)) for seed in (2**63, 2**64 - 1, 2**32, 0)}) == 4


def test_the_last_bit_of_the_logits_does_not_matter():
    """Another batch size changes float32 logits in the last bits; a seeded stream must not notice."""
    logits = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0)) * 3
    rules = [(Sampling(temperature=1.0, seed=5), i) for i in range(2000)]
    assert torch.equal(pick(logits, rules), pick(logits * (1 + 2e-7), rules))


def test_greedy_rows_are_the_arg_max():
    logits = torch.randn(5, 11)
    assert torch.equal(pick(logits, [(Sampling(), 0)] * 5), logits.argmax(-1))


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(6, 50)
    rules = [(Sampling(temperature=0.5 * (i % 3), top_p=0.9, seed=i), i) for i in range(6)]
    together = pick(logits, rules)
    alone = torch.cat([pick(logits[i : i + 1], [rules[i]]) for i in range(6)])
    assert torch.equal(together, alone)


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    draws = torch.cat([pick(logits, [(Sampling(temperature=0.7, seed=1), i)]) for i in range(3000)])
    wanted = torch.softmax(logits[0].double() / 0.7, -1)
    assert torch.allclose(torch.bincount(draws, minlength=4) / 3000, wanted.float(), atol=0.03)


def test_top_p_that_is_reached_exactly_takes_no_token_more():
    """Of equally likely tokens half of them are half of it all: the lower ones."""
    rules = [(Sampling(temperature=1.0, top_p=0.5, seed=2), i) for i in range(4000)]
    for size in (4, 256):
        assert set(pick(torch.zeros(4000, size), rules).tolist()) == set(range(size // 2))


def test_a_low_temperature_is_not_greedy_and_a_high_one_not_uniform():
    logits = torch.tensor([[1.0, 0.0]])
    for temperature, share in ((0.5, 0.881), (2.0, 0.622)):
        draws = torch.cat([pick(logits, [(Sampling(temperature=temperature, seed=1), i)]) for i in range(3000)])
        assert float((draws == 0).float().mean()) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("top_p", [0.01, 0.6, 0.95])
def test_top_p_keeps_the_smallest_set(top_p):
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    seen = {int(pick(logits, [(Sampling(temperature=1.0, top_p=top_p, seed=2), i)])) for i in range(500)}
    assert seen == {0.01: {0}, 0.6: {0, 1}, 0.95: {0, 1, 2}}[top_p]
