"""Picking the next token: a pure function of logits, seed and position, on any rank, in any batch."""

from collections.abc import Sequence

import numpy as np
import torch

from elastic_moe.serving.protocol import Sampling


def noise(seed: int, position: int, size: int) -> torch.Tensor:
    """float64 [size] draws from the exponential distribution: a function of the arguments (counter-based, Philox)."""
    key = np.array([seed % 2**64, position], dtype=np.uint64)
    return torch.from_numpy(-np.log1p(-np.random.Generator(np.random.Philox(key=key)).random(size)))


def pick(logits: torch.Tensor, rules: Sequence[tuple[Sampling, int]]) -> torch.Tensor:
    """The next token of each row.

    Drawn as an exponential race, the arg max of probability / noise: whatever perturbs the logits in the last bit
    (another batch, another rank) changes the winner only if two tokens finish within that bit of each other. Walking
    up the cumulative distribution instead would let every boundary of the vocabulary shift.

    Args:
        logits: float32 [N, V].
        rules: for each row its sampling parameters and the output position of the token to pick.

    Returns:
        int64 [N]: the arg max where the temperature is 0, else a draw from the softmax at that temperature,
        restricted to the smallest set of tokens whose probability reaches top_p.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, (sampling, _) in enumerate(rules) if sampling.temperature > 0]
    if not drawn:
        return tokens

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(-1)

    rows = torch.tensor(drawn, device=logits.device)
    temperature = column([rules[row][0].temperature for row in drawn])
    top_p = column([rules[row][0].top_p for row in drawn])
    probs = torch.softmax(logits[rows].double() / temperature, dim=-1)
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    outside = torch.empty_like(probs, dtype=torch.bool).scatter_(-1, order, ordered.cumsum(dim=-1) - ordered >= top_p)
    finish = torch.stack([noise(rules[row][0].seed, rules[row][1], logits.shape[-1]) for row in drawn])
    tokens[rows] = (probs.masked_fill(outside, 0.0) / finish.to(logits.device)).argmax(dim=-1)
    return tokens
