"""Which steps of a balancing to make when only so many moves are allowed over all layers."""

import numpy as np


def steps_within(max_moves: int, trail: np.ndarray, steps: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """How many of its steps each layer may make so that all layers together make `max_moves` at most.

    Stretches of steps with the most gain per move come first; a layer whose next stretch no longer fits stops.
    The moves before a layer's first step (coverage) are never refused.

    Args:
        max_moves: the bound.
        trail: int64 [L, steps, 2], moves so far and the heaviest load, before the first step and after each.
        steps: int64 [L], steps that each layer would make.
        unit: float64 [L], what one unit of its load is worth.

    Returns:
        int64 [L].
    """
    stretches = [
        (-gain * unit[layer], layer, end, moves)
        for layer, last in enumerate(steps)
        for gain, end, moves in _stretches(trail[layer, : last + 1])
    ]
    left = max_moves - int(trail[:, 0, 0].sum())
    allowed = np.zeros_like(steps)
    stopped: set[int] = set()
    for _, layer, end, moves in sorted(stretches):
        if layer in stopped or moves > left:
            stopped.add(layer)
            continue
        left -= moves
        allowed[layer] = end
    return allowed


def _stretches(trail: np.ndarray) -> list[tuple[float, int, int]]:
    """(gain per move, last step, moves) of the stretches of one layer, falling gain: its concave hull."""
    found, at = [], 0
    while at + 1 < len(trail):
        moves = trail[at + 1 :, 0] - trail[at, 0]
        gains = (trail[at, 1] - trail[at + 1 :, 1]) / np.maximum(moves, 0.5)
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        at += 1 + best
        found.append((float(gains[best]), at, int(moves[best])))
    return found
