"""A conversion that only puts tensors beside each other needs no memory of its own: each goes to its place at once.

Which ones do is not known by their names but tried: the conversion runs once on tensors whose elements are numbers of
their own. Where each source is found whole in what is made, and nothing else is, its place there is known.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

MAX_ELEMENTS = 2**31 - 1
"""Numbers are int32."""


class Copy(NamedTuple):
    """One source of an expert, and where it goes."""

    pattern: str
    position: int
    """Among the sources of its pattern."""
    target: int
    """Which of the things that are made; they have the experts first."""
    region: tuple[slice, ...]
    """Of the expert in it."""
    is_part: bool
    """Whether that is not all of it."""


Run = Callable[[Mapping[str, list[torch.Tensor]]], Mapping[str, torch.Tensor]]


def find_copies(shapes: Mapping[str, Sequence[tuple[int, ...]]], run: Run) -> tuple[Copy, ...] | None:
    """How a conversion of one expert puts its sources together; None if it does anything else with them.

    Args:
        shapes: of the sources, by their pattern.
        run: the conversion: tensors by pattern -> tensors by name, with the one expert as first dimension.
    """
    numbered, count = {}, 0
    for pattern, group in shapes.items():
        numbered[pattern] = []
        for shape in group:
            size = torch.Size(shape).numel()
            if count + size > MAX_ELEMENTS:
                return None
            numbered[pattern].append(torch.arange(count, count + size, dtype=torch.int32).view(shape))
            count += size
    try:
        made = list(run({pattern: list(group) for pattern, group in numbered.items()}).values())
    except (RuntimeError, TypeError, ValueError):  # of something that needs floats
        return None
    found = []
    for pattern, group in numbered.items():
        for position, source in enumerate(group):
            places = enumerate(_place(source, tensor) for tensor in made)
            copies = [
                Copy(pattern, position, target, region, source.numel() < made[target].numel())
                for target, region in places
                if region is not None
            ]
            if len(copies) != 1:
                return None
            found += copies
    return tuple(found) if sum(tensor.numel() for tensor in made) == count else None


def _place(source: torch.Tensor, made: torch.Tensor) -> tuple[slice, ...] | None:
    """Where `source` lies in `made[0]` as one block; None if it does not."""
    if made.dtype != source.dtype or made.dim() < 2 or len(made) != 1 or not source.numel():
        return None
    expert = made[0]
    block = source.reshape(source.shape[1:]) if source.dim() > expert.dim() and len(source) == 1 else source
    first = (expert == block.flatten()[0]).nonzero()
    if block.dim() != expert.dim() or len(first) != 1:
        return None
    region = tuple(slice(begin, begin + n) for begin, n in zip(first[0].tolist(), block.shape, strict=True))
    return region if torch.equal(expert[region], block) else None
