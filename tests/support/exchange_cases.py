"""What every TokenExchange must do: a table of cases, run on the exchange of each kind, against one process.

The expert in slot s is x -> x * (s + 1) + s, so a row in a wrong slot shows. Every case runs in every setup, one after
the other on the same exchange, so what one leaves in a buffer would show in the next.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from elastic_moe.exchange.interface import TokenExchange
from elastic_moe.membership.launch import Launch
from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.placement.topology import Topology

HIDDEN = 64
MAX_TOKENS = 80


@dataclass(frozen=True)
class Setup:
    """What all calls of one exchange have in common. `ranks` are the members' seats; others are empty.

    S >= K, for some exchanges have no room for a slot that comes twice in a token with fewer.
    """

    ranks: tuple[int, ...]
    top_k: int = 2
    slots_per_rank: int = 4
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        seats = "-".join(map(str, self.ranks))
        return f"seats_{seats}-k{self.top_k}-s{self.slots_per_rank}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def num_seats(self) -> int:
        return max(self.ranks) + 1

    def slots_of(self, rank: int) -> range:
        return range(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)

    @property
    def slots(self) -> torch.Tensor:
        """Of all members."""
        return torch.tensor([slot for rank in self.ranks for slot in self.slots_of(rank)])


Route = Callable[[Setup, int, int, torch.Generator], torch.Tensor]
"""(setup, rank, T, generator) -> int64 [T, K] slots."""


def anywhere(setup: Setup, rank: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    valid = setup.slots
    scores = torch.rand((num_tokens, len(valid)), generator=generator)
    return valid[scores.argsort(1)[:, : setup.top_k]]


def all_to_one_slot(setup: Setup, rank: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    return setup.slots[-1:].expand(num_tokens, setup.top_k)


def a_slot_twice_in_a_token(setup: Setup, rank: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    slots = anywhere(setup, rank, num_tokens, generator)
    slots[:, -1] = slots[:, 0]
    return slots


def all_to_one_rank(setup: Setup, rank: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    scores = torch.rand((num_tokens, setup.slots_per_rank), generator=generator)
    return scores.argsort(1)[:, : setup.top_k] + setup.slots_of(setup.ranks[0])[0]


def some_pairs_to_nobody(setup: Setup, rank: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    slots = anywhere(setup, rank, num_tokens, generator)
    slots[torch.rand(slots.shape, generator=generator) < 0.5] = EMPTY
    return slots


def some_tokens_to_nobody(setup: Setup, rank: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    slots = anywhere(setup, rank, num_tokens, generator)
    slots[::3] = EMPTY
    return slots


def all_to_nobody(setup: Setup, rank: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.full((num_tokens, setup.top_k), EMPTY)


def first_rank_to_nobody(setup: Setup, rank: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    return (all_to_nobody if rank == setup.ranks[0] else anywhere)(setup, rank, num_tokens, generator)


def by_a_placement(setup: Setup, rank: int, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Replicas of K + 1 experts in all slots of the members, holes in the others, and a router that also says -1."""
    num_experts = setup.top_k + 1
    held = np.full((1, setup.num_seats * setup.slots_per_rank), EMPTY)
    members = setup.slots.numpy()
    held[0, members] = np.arange(len(members)) % num_experts
    placement = Placement(held, num_experts, setup.slots_per_rank)
    registry = PlacementRegistry(placement, rank, Topology.uniform(setup.num_seats), torch.device("cpu"))
    experts = torch.rand((num_tokens, num_experts), generator=generator).argsort(1)[:, : setup.top_k]
    experts[torch.rand(experts.shape, generator=generator) < 0.2] = EMPTY
    slots = registry.choose_slots(0, experts)
    wanted = torch.where(slots < 0, EMPTY, torch.from_numpy(held[0])[slots])
    assert torch.equal(wanted, experts)
    return slots


@dataclass(frozen=True)
class Case:
    """`tokens` says how many a member has, by its number in the group."""

    name: str
    route: Route
    tokens: Callable[[int], int]
    strided: bool = False

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("as many tokens everywhere", anywhere, lambda i: 5),
    Case("some ranks without tokens", anywhere, lambda i: 0 if i % 2 == 0 else 7),
    Case("one rank with tokens", anywhere, lambda i: 0 if i else 9),
    Case("no tokens at all", anywhere, lambda i: 0),
    Case("uneven", anywhere, lambda i: (1, MAX_TOKENS, 0, 17)[i % 4]),
    Case("all to one slot", all_to_one_slot, lambda i: MAX_TOKENS - i),
    Case("all to one rank", all_to_one_rank, lambda i: 6 + i),
    Case("a slot twice in a token", a_slot_twice_in_a_token, lambda i: 8),
    Case("some pairs to nobody", some_pairs_to_nobody, lambda i: 11 + i),
    Case("some tokens to nobody", some_tokens_to_nobody, lambda i: 7 + i),
    Case("all tokens of a rank to nobody", first_rank_to_nobody, lambda i: 6),
    Case("all to nobody", all_to_nobody, lambda i: 4 + i),
    Case("after all to nobody", anywhere, lambda i: 4 + i),
    Case("replicas", by_a_placement, lambda i: 20 - i),
    Case("inputs that are strided", some_pairs_to_nobody, lambda i: 10 + i, strided=True),
]

SETUPS = [
    Setup((0,)),
    Setup((1,), top_k=1),
    Setup((0, 1)),
    Setup((0, 1), top_k=1, slots_per_rank=1),
    Setup((0, 2), dtype=torch.bfloat16),
    Setup((0, 2, 3), top_k=3, slots_per_rank=3),
    Setup((0, 1, 2, 3), top_k=8, slots_per_rank=16, dtype=torch.bfloat16),
]


def inputs_of(setup: Setup, case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, slots) of `rank`, the same in whichever process it is asked for. Whole numbers, so sums of gradients are
    exact; what goes to nobody at all is NaN."""
    generator = torch.Generator().manual_seed(100 * CASES.index(case) + rank)
    num_tokens = case.tokens(setup.ranks.index(rank))
    hidden = torch.randint(-9, 10, (num_tokens, HIDDEN), generator=generator).to(setup.dtype)
    slots = case.route(setup, rank, num_tokens, generator)
    hidden[(slots == EMPTY).all(1)] = torch.nan
    return hidden, slots


def strided(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same numbers, each with one between it and the next that is none of them."""
    wide = torch.full((tensor.shape[0], tensor.shape[1], 2), 77, dtype=tensor.dtype, device=device)
    wide[..., 0] = tensor.to(device)
    return wide[..., 0]


def expert(rows: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Row m by the expert in slot slots[m]; `scale` [P] is s + 1."""
    slot = slots[..., None]
    return (rows.to(scale.dtype) * scale[slots][..., None] + slot).to(rows.dtype)


def expected_rows(setup: Setup, case: Case, rank: int) -> tuple[torch.Tensor, list[int]]:
    """What arrives at `rank`: rows by slot, source and pair, and the ends of the slots."""
    rows, ends = [torch.empty((0, HIDDEN), dtype=setup.dtype)], []
    for slot in setup.slots_of(rank):
        for source in setup.ranks:
            hidden, slots = inputs_of(setup, case, source)
            rows.append(hidden[(slots == slot).nonzero()[:, 0]])
        ends.append(sum(map(len, rows)))
    return torch.cat(rows), ends


def expected_results(hidden: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[T, K, D]: computed here, zeros for nobody."""
    results = expert(hidden[:, None].expand(-1, slots.shape[1], -1), slots.clamp(min=0), scale)
    return results.masked_fill((slots == EMPTY)[..., None], 0)


def scales(setup: Setup) -> torch.Tensor:
    return torch.arange(1.0, setup.num_seats * setup.slots_per_rank + 1)


Opened = AbstractContextManager[tuple[TokenExchange, torch.device]]
"""An exchange of the setup's members, and where its tensors lie. It is left by all members together."""


def conform(launch: Launch, open_exchange: Callable[[Launch, Setup], Opened], setup: Setup) -> bool:
    """For `run_ranks`: every case on the exchange of one kind, in the seat `setup.ranks[launch.rank]`."""
    with open_exchange(launch, setup) as (exchange, device):
        check_cases(exchange, setup, setup.ranks[launch.rank], device)
    return True


def check_cases(exchange: TokenExchange, setup: Setup, rank: int, device: torch.device) -> None:
    """Every case, on all members at the same time; AssertionError names the case."""
    scale = scales(setup)
    for case in CASES:
        hidden, slots = inputs_of(setup, case, rank)
        place = strided if case.strided else torch.Tensor.to
        sent = exchange.dispatch(place(hidden, device), place(slots, device))
        rows, ends = expected_rows(setup, case, rank)
        number = torch.arange(sent.rows.shape[0], dtype=torch.int32, device=device)
        slot = torch.searchsorted(sent.offsets, number, right=True) + rank * setup.slots_per_rank
        answers = expert(sent.rows, slot.clamp(max=len(scale) - 1), scale.to(device))
        results = exchange.combine(strided(answers, device) if case.strided else answers, sent.ticket)
        exchange.check()
        where = f"{case} on rank {rank}"
        assert sent.offsets.dtype == torch.int32, where
        assert sent.offsets.tolist() == ends, f"{where}: {sent.offsets.tolist()} rows came, expected {ends}"
        assert torch.equal(sent.rows[: ends[-1]].cpu(), rows), f"{where}: other rows came"
        assert torch.equal(results.cpu(), expected_results(hidden, slots, scale)), f"{where}: other results"


def check_gradients(exchange: TokenExchange, setup: Setup, rank: int) -> list[torch.Tensor]:
    """Every case of a differentiable exchange on the CPU: the gradient of each token, and, returned by case, what this
    rank's experts add to that of their scales; see `expected_scale_gradients`."""
    gradients = []
    for case in CASES:
        hidden, slots = inputs_of(setup, case, rank)
        hidden = hidden.nan_to_num().requires_grad_()
        weights = _weights(rank, slots)
        scale = scales(setup).requires_grad_()
        sent = exchange.dispatch(strided_leaf(hidden) if case.strided else hidden, slots)
        slot = torch.searchsorted(sent.offsets, torch.arange(len(sent.rows), dtype=torch.int32), right=True)
        results = exchange.combine(expert(sent.rows, slot + rank * setup.slots_per_rank, scale), sent.ticket)
        (results * weights).sum().backward()
        (wanted,) = torch.autograd.grad(_loss(hidden, slots, scales(setup), weights), hidden)
        where = f"{case} on rank {rank}"
        assert hidden.grad is not None, where
        assert torch.equal(hidden.grad, wanted), f"{where}: another gradient"
        assert not hidden.grad[(slots == EMPTY).all(1)].any(), f"{where}: a token for nobody has a gradient"
        assert scale.grad is not None, where
        gradients.append(scale.grad)
    return gradients


def expected_scale_gradients(setup: Setup) -> list[torch.Tensor]:
    """By case, of the tokens of all ranks."""
    gradients = []
    for case in CASES:
        scale = scales(setup).requires_grad_()
        for rank in setup.ranks:
            hidden, slots = inputs_of(setup, case, rank)
            _loss(hidden.nan_to_num(), slots, scale, _weights(rank, slots)).backward()
        gradients.append(torch.zeros_like(scale) if scale.grad is None else scale.grad)
    return gradients


def strided_leaf(hidden: torch.Tensor) -> torch.Tensor:
    """Not contiguous, and its gradient goes back to `hidden`."""
    return torch.stack((hidden, torch.zeros_like(hidden)), dim=-1)[..., 0]


def _weights(rank: int, slots: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-3, 4, (*slots.shape, HIDDEN), generator=generator).float()


def _loss(hidden: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (expected_results(hidden, slots, scale) * weights).sum()
