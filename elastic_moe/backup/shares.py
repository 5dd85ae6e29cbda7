"""Which nodes keep a copy of which expert: by rendezvous hashing, so a node that comes or goes moves its part only."""

from collections.abc import Iterable
from hashlib import blake2b


def keepers(layer: int, expert: int, nodes: Iterable[int], copies: int) -> tuple[int, ...]:
    """The `copies` nodes that keep an expert, all if there are fewer, those that are asked first first."""
    return tuple(sorted(nodes, key=lambda node: (_weight(layer, expert, node), node))[:copies])


def share(node: int, num_layers: int, num_experts: int, nodes: Iterable[int], copies: int) -> set[tuple[int, int]]:
    """(layer, expert) of all that `node` keeps."""
    nodes = tuple(nodes)
    everything = ((layer, expert) for layer in range(num_layers) for expert in range(num_experts))
    return {(layer, expert) for layer, expert in everything if node in keepers(layer, expert, nodes, copies)}


def _weight(layer: int, expert: int, node: int) -> bytes:
    return blake2b(f"{layer} {expert} {node}".encode(), digest_size=8).digest()
