"""The exchanges of one rank over the epochs: what is reserved once, and what each view needs."""

import logging
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from elastic_moe.config import ExchangeConfig
from elastic_moe.errors import PeerLost
from elastic_moe.exchange.collective import CollectiveExchange
from elastic_moe.exchange.interface import TokenExchange
from elastic_moe.exchange.layout import ExchangeLayout
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.view import Member, View

if TYPE_CHECKING:
    from elastic_moe.exchange.symmetric import SymmetricExchange

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenShape:
    """What a token is: D elements of `dtype`, for K experts."""

    hidden_size: int
    top_k: int
    dtype: torch.dtype


class Exchanges(ABC):
    """Opens the exchange of each epoch."""

    can_rehearse = False
    """Whether there is `muted`."""

    def muted(self, slots_per_rank: int) -> AbstractContextManager[TokenExchange]:
        """An exchange whose calls reach nobody and return garbage; in an epoch or before the first."""
        raise NotImplementedError

    def reserve(self, max_slots: int, tokens: TokenShape) -> None:  # noqa: B027 - most take what they need as they go
        """Take what all epochs need, for at most `max_slots` slots on a rank. Before the first `enter`.

        Raises:
            ValueError: tokens that this kind does not take.
        """

    @abstractmethod
    def enter(self, view: View, groups: EpochGroups, slots_per_rank: int) -> TokenExchange:
        """The exchange of `view`, whose groups are built. Collective. It breaks off when the groups are aborted; they
        are, if a member did not come."""

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what is reserved."""


class CollectiveExchanges(Exchanges):
    """Over each epoch's data group."""

    def enter(self, view: View, groups: EpochGroups, slots_per_rank: int) -> TokenExchange:
        """See `Exchanges.enter`."""
        return CollectiveExchange(groups.data, view.ranks, slots_per_rank)


class SymmetricExchanges(Exchanges):
    """One exchange, reserved once, that goes from epoch to epoch."""

    can_rehearse = True

    def __init__(
        self, config: ExchangeConfig, me: Member, num_seats: int, device: torch.device, timeout_s: float
    ) -> None:
        """See `SymmetricExchange`."""
        self._config = config
        self._me = me
        self._num_seats = num_seats
        self._device = device
        self._timeout_s = timeout_s
        self._exchange: SymmetricExchange | None = None

    def reserve(self, max_slots: int, tokens: TokenShape) -> None:
        """See `Exchanges.reserve`. Only here Triton and the CUDA bindings are needed."""
        from elastic_moe.exchange.symmetric import SymmetricExchange

        layout = ExchangeLayout(
            self._num_seats,
            max_slots,
            self._config.max_tokens,
            tokens.top_k,
            tokens.hidden_size,
            tokens.dtype.itemsize,
        )
        self._exchange = SymmetricExchange(
            self._me.incarnation,
            self._me.rank,
            layout,
            tokens.dtype,
            self._device,
            timeout_s=self._timeout_s,
            fp8=self._config.fp8,
        )

    def muted(self, slots_per_rank: int) -> AbstractContextManager[TokenExchange]:
        """See `Exchanges.muted`."""
        return self._reserved().muted(slots_per_rank)

    def enter(self, view: View, groups: EpochGroups, slots_per_rank: int) -> TokenExchange:
        """See `Exchanges.enter`."""
        exchange = self._reserved()
        try:
            exchange.enter(view, slots_per_rank, groups.control.barrier)
        except PeerLost as error:
            log.warning("symmetric exchange: %s", error)
            groups.abort()  # so the next handshake says so too, and this rank recovers again
        groups.when_aborted(lambda: exchange.abort(view.epoch))
        return exchange

    def _reserved(self) -> "SymmetricExchange":
        if self._exchange is None:
            raise ValueError("exchange.kind=symmetric: memory must be reserved before experts are placed, see reserve")
        return self._exchange

    def close(self) -> None:
        """See `Exchanges.close`."""
        if self._exchange is not None:
            self._exchange.close()


def exchanges_of(
    config: ExchangeConfig | None, me: Member, num_seats: int, device: torch.device, timeout_s: float
) -> Exchanges:
    """What `config` asks for, by default collectives, for the process `me` in one of R seats.

    A call waits `timeout_s` for a peer.

    Raises:
        ValueError: a value of `config` cannot work, or not on this device.
    """
    config = config or ExchangeConfig()
    config.validate()
    if config.kind == "collective":
        return CollectiveExchanges()
    if device.type != "cuda":
        raise ValueError(f"exchange.kind=symmetric needs a CUDA device, not {device}")
    return SymmetricExchanges(config, me, num_seats, device, timeout_s)
