"""The front end's side of the load balancer: operations that clients ask for, and the loads of all ranks."""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Mapping

import msgspec
import numpy as np

from elastic_moe.control.report import RebalanceReport
from elastic_moe.errors import ElasticError
from elastic_moe.serving.front_end.engine_link import EngineLink
from elastic_moe.serving.protocol import AskLoads, Loads, Rebalance

KEPT = 1000
"""Operations that are remembered."""
ANSWER_S = 5.0
"""How long ranks may take to tell their loads."""


class BalancerOff(ElasticError):
    """A rebalance was asked for, but the server runs without the balancer."""


class Operation(msgspec.Struct):
    """One rebalance that a client asked for."""

    id: str
    state: str = "pending"
    """`pending`, or the outcome of its round: `moved`, `kept`, `failed`."""
    report: RebalanceReport | None = None


class LoadDump(msgspec.Struct, frozen=True):
    """Tokens per logical expert in the windows of the ranks that answered. `eplb.initial_loads` takes it as a file."""

    logical_count: list[list[int]]
    ranks: list[int]
    missing_ranks: list[int]


class BalanceDesk:
    """Everything runs in the gateway's event loop."""

    def __init__(self, mode: str, links: Mapping[int, EngineLink]) -> None:
        """`mode` is `eplb.mode`; `links` are the gateway's, by rank."""
        self._mode = mode
        self._links = links
        self._operations: OrderedDict[str, Operation] = OrderedDict()
        self._asks: dict[tuple[str, int], asyncio.Future[Loads]] = {}

    def rebalance(self) -> Operation:
        """Have all engines balance now.

        Raises:
            BalancerOff: `eplb.mode` is off.
        """
        if self._mode == "off":
            raise BalancerOff("eplb.mode=off: start the server with eplb.mode=async (or sync) to rebalance")
        operation = Operation(secrets.token_hex(8))
        self._operations[operation.id] = operation
        if len(self._operations) > KEPT:
            self._operations.popitem(last=False)
        for link in self._links.values():
            link.send(Rebalance(operation.id))
        return operation

    def operation(self, name: str) -> Operation | None:
        """The operation of that id; None if there is none (any more)."""
        return self._operations.get(name)

    def greet(self, link: EngineLink) -> None:
        """A new engine: those who were asked may all be gone."""
        for operation in self._operations.values():
            if operation.state == "pending":
                link.send(Rebalance(operation.id))

    def finish(self, report: RebalanceReport) -> None:
        """A round has ended; the first report that names an operation is its end."""
        for name in report.ops:
            operation = self._operations.get(name)
            if operation is not None and operation.state == "pending":
                operation.state, operation.report = report.outcome, report

    async def loads(self) -> LoadDump:
        """The loads of all ranks that answer in time, summed."""
        ask, futures = secrets.token_hex(8), {}
        for rank, link in self._links.items():
            futures[rank] = self._asks[ask, rank] = asyncio.get_running_loop().create_future()
            link.send(AskLoads(ask))
        try:
            if futures:
                await asyncio.wait(futures.values(), timeout=ANSWER_S)
        finally:
            for rank in futures:
                del self._asks[ask, rank]
        answers = {rank: f.result().loads for rank, f in futures.items() if f.done() and f.result().loads}
        total = np.sum([np.array(loads) for loads in answers.values()], axis=0) if answers else np.zeros((0, 0), int)
        return LoadDump(total.tolist(), sorted(answers), sorted(futures.keys() - answers.keys()))

    def take(self, rank: int, answer: Loads) -> None:
        """A rank has told its loads."""
        future = self._asks.get((answer.ask, rank))
        if future is not None and not future.done():
            future.set_result(answer)
