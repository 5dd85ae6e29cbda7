"""ExpertPool: what one rank has of the experts of all MoE layers. The layers ask it, the runtime leads it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

from elastic_moe.config import EplbConfig
from elastic_moe.control.rebalancer import Rebalancer
from elastic_moe.control.settle import settle
from elastic_moe.deadlines import Deadlines
from elastic_moe.exchange.epochs import Exchanges
from elastic_moe.exchange.interface import TokenExchange
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.view import View
from elastic_moe.placement.loads import LoadCounter
from elastic_moe.placement.placement import Placement
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.pulse import Pulse
from elastic_moe.runtime.idle import IdleForward
from elastic_moe.transport.staging import Staging
from elastic_moe.weights.manifest import DigestFile
from elastic_moe.weights.reserves import Reserves
from elastic_moe.weights.sources import Account
from elastic_moe.weights.store import ExpertStore

Thing = TypeVar("Thing")


class ExpertPool:
    """The experts of one rank: where all are placed, which are held here, how tokens reach them, how they are balanced.

    Made by `ElasticRuntime.place`, completed by `ElasticRuntime.hold`.
    """

    def __init__(
        self,
        registry: PlacementRegistry,
        exchanges: Exchanges,
        staging: Staging,
        eplb: EplbConfig,
        device: torch.device,
        deadlines: Deadlines,
        *,
        pulse: Pulse,
        steps: Callable[[], int],
        wake: Callable[[], None],
        committed: Callable[[Placement], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        """
        Args:
            registry: the committed placement.
            exchanges: opens the way of tokens in each epoch.
            staging: how experts come to where a rebalance swaps them in.
            eplb: how they are balanced.
            device: where experts and tokens live.
            deadlines: of waits for other ranks.
            pulse: beats with every layer.
            steps, wake, committed, on_error: see `Rebalancer`.
        """
        placement = registry.placement
        self.registry = registry
        self.slots_per_rank = placement.slots_per_rank
        """S, as it was asked for: after losses it may be more for a while."""
        self.loads = LoadCounter(placement.num_layers, placement.num_experts, device)
        """Where the layers count their tokens."""
        self.balancer = Rebalancer(
            eplb,
            registry.rank,
            registry,
            self.loads,
            steps,
            staging,
            deadlines,
            wake=wake,
            committed=committed,
            on_error=on_error,
        )
        self.pulse = pulse
        """Beats with every layer."""
        self.idle = IdleForward()
        self.loaded = Account()
        """What this process has loaded its experts from, at its start."""
        self.reserves = Reserves()
        """Where experts come from that no live rank holds."""
        self._exchanges = exchanges
        self._exchange: TokenExchange | None = None
        self._store: ExpertStore | None = None

    @property
    def placement(self) -> Placement:
        """The committed one."""
        return self.registry.placement

    @property
    def exchange(self) -> TokenExchange:
        """The way tokens travel in this epoch; RuntimeError before the first."""
        return _known(self._exchange, "this process is in no epoch yet")

    @property
    def store(self) -> ExpertStore:
        """The experts held here; RuntimeError before `hold`."""
        return _known(self._store, "no experts are held yet: call runtime.hold or elasticize first")

    def hold(self, store: ExpertStore, reserves: Reserves) -> None:
        """Take the experts of this rank, loaded as the placement says, in order to move and restore them later.

        Raises:
            ValueError: experts shall be balanced, but there are no `reserves`: a loss amid a move could not be mended.
        """
        mode = self.balancer.config.mode
        if not reserves and mode != "off":
            raise ValueError(f"eplb.mode={mode} needs a checkpoint; elasticize with checkpoint=, or use off")
        self._store, self.reserves = store, reserves

    def settle(
        self, view: View, groups: EpochGroups, dense: Mapping[str, torch.Tensor], kept: DigestFile | None
    ) -> None:
        """All members hold the same bytes from here on, see `control.settle`. Collective."""
        settle(view, groups, self.placement.of_rank(self.registry.rank), self.store, self.reserves, dense, kept)

    def enter(self, view: View, groups: EpochGroups) -> None:
        """Tokens travel among the members of `view` from now on. Collective."""
        self._exchange = self._exchanges.enter(view, groups, self.placement.slots_per_rank)

    def balance(self, view: View, groups: EpochGroups, *, changed: bool) -> None:
        """Balance in the epoch of `view`; `changed`: its members are others than before."""
        self.balancer.begin_epoch(view, groups, self.store, self.reserves, changed=changed)

    def join_idle(self) -> None:
        """Go through all layers without tokens, and do this rank's share for the others.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        self.idle(self.placement.slots_per_rank)

    @property
    def can_rehearse(self) -> bool:
        """Whether there is `rehearse`."""
        return self._exchanges.can_rehearse

    def rehearse(self, act: Callable[[], None]) -> None:
        """Run `act`, forwards that reach nobody and count for nothing: kernels are loaded and CUDA graphs made before
        they are needed. Where `can_rehearse`; while no peer waits for this rank."""
        with self.loads.stopped(), self._muted():
            act()

    @contextlib.contextmanager
    def _muted(self) -> Iterator[None]:
        usual = self._exchange
        with self._exchanges.muted(self.placement.slots_per_rank) as self._exchange:
            yield
        self._exchange = usual or self._exchange

    def check_integrity(self) -> None:
        """Whether tables, slots and placement still say the same, and one expert more has its digest. For idle time.

        Raises:
            ValueError: they do not; the process must not go on.
        """
        self.registry.check_integrity()
        self.store.check_integrity(self.placement.of_rank(self.registry.rank))


def _known(thing: Thing | None, otherwise: str) -> Thing:
    if thing is None:
        raise RuntimeError(otherwise)
    return thing
