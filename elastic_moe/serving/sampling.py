"""Picking the next token: a pure function of logits, seed and position, on any rank, in any batch."""

from collections.abc import Sequence

import numpy as np
import torch

from elastic_moe.serving.protocol import Sampling


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on `seed` and `position` only (counter-based: Philox)."""
    generator = np.random.Philox(key=seed % 2**64, counter=position)
    return float(generator.random_raw() >> np.uint64(11)) * 2.0**-53


def pick(logits: torch.Tensor, rules: Sequence[tuple[Sampling, int]]) -> torch.Tensor:
    """The next token of each row.

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
    chance = column([uniform(rules[row][0].seed, rules[row][1]) for row in drawn])
    probs, order = torch.softmax(logits[rows].double() / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probs.cumsum(dim=-1) - probs
    kept = torch.where(before < top_p, probs, 0.0)
    ends = kept.cumsum(dim=-1)
    choice = torch.searchsorted(ends, chance * ends[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    tokens[rows] = order.gather(-1, choice).squeeze(-1)
    return tokens
