"""Experts that this process holds outside of slots, as a source: those of a model that has all its weights."""

from collections.abc import Iterator, Sequence

import torch

from elastic_moe.weights.sources import Came, Landing, Origin, Source, Told, Until, Want


class InMemory(Source):
    """Every expert of every layer."""

    nearest = Origin.MEMORY

    def __init__(self, layers: Sequence[Sequence[torch.Tensor]]) -> None:
        """`layers` are the tensors [E, ...] of each MoE layer, in the order of its layout."""
        self._layers = layers

    def fetch(self, wants: Sequence[Want], landing: Landing, until: Until) -> Iterator[Told]:
        """See `Source.fetch`."""
        for want in wants:
            for target, source in zip(landing.open(want), self._layers[want.layer], strict=True):
                target.copy_(source[want.expert])
            yield [Came(want, Origin.MEMORY)]
