"""exchanges_of: what may be asked for, and that a symmetric exchange is only opened where it can work."""

import pytest
import torch

from elastic_moe.config import ExchangeConfig
from elastic_moe.deadlines import Deadlines
from elastic_moe.exchange.epochs import CollectiveExchanges, SymmetricExchanges, exchanges_of
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.view import Member, View

ME = Member(0, 0, "me", 0, "127.0.0.1", "", "127.0.0.1:1")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ExchangeConfig(kind="nvshmem"), "exchange.kind='nvshmem': must be one of collective, symmetric"),
        (ExchangeConfig(max_tokens=0), "exchange.max_tokens=0: must be 1 or more"),
        (ExchangeConfig(kind="symmetric"), "exchange.kind=symmetric needs a CUDA device, not cpu"),
    ],
)
def test_what_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        exchanges_of(config, ME, 2, CPU, 1.0)


def test_collectives_are_the_default():
    assert isinstance(exchanges_of(None, ME, 2, CPU, 1.0), CollectiveExchanges)


def test_memory_is_reserved_before_an_epoch_is_entered():
    exchanges = exchanges_of(ExchangeConfig(kind="symmetric"), ME, 2, torch.device("cuda"), 1.0)
    assert isinstance(exchanges, SymmetricExchanges)
    view = View(1, (ME,))
    with pytest.raises(ValueError, match="must be reserved before"):
        exchanges.enter(view, EpochGroups(view, 0, CPU, Deadlines()), 4)
    exchanges.close()


def test_what_hangs_on_the_groups_is_told_of_their_abort_also_afterwards():
    groups = EpochGroups(View(1, (ME,)), 0, CPU, Deadlines())
    told = []
    groups.when_aborted(lambda: told.append("before"))
    groups.abort()
    groups.when_aborted(lambda: told.append("after"))
    assert told == ["before", "after"]
