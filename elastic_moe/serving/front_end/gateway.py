"""The gateway of one node: it gives requests to engines, collects their tokens, and moves them when a rank is lost."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from types import TracebackType

import zmq.asyncio

from elastic_moe.control.report import RebalanceReport
from elastic_moe.errors import ElasticError
from elastic_moe.group.view import View
from elastic_moe.serving.front_end.balance_desk import BalanceDesk
from elastic_moe.serving.front_end.cluster_status import ClusterStatus, MemberStatus, RequestStatus, newest_placement
from elastic_moe.serving.front_end.engine_link import EngineLink
from elastic_moe.serving.front_end.events import EventLog
from elastic_moe.serving.front_end.journal import Entry, Journal, Owner
from elastic_moe.serving.front_end.metrics import Metrics
from elastic_moe.serving.front_end.routing import choose_rank
from elastic_moe.serving.protocol import Cancel, Event, Finish, Hello, Loads, Phase, Sampling, Status, Step, Tokens
from elastic_moe.weights.holding import HolderAddress, InstanceWeights
from elastic_moe.wire import PLAIN, Wire

HELLO_INTERVAL_S = 1.0

logger = logging.getLogger(__name__)


class TooManyRequests(ElasticError):
    """As many requests are in flight as `server.max_waiting` allows."""


class GenerationFailed(ElasticError):
    """The engine could not go on with a request."""


class Stopping(GenerationFailed):
    """The front end is shutting down."""


class Unavailable(GenerationFailed):
    """No rank can serve now, and the ranks say why; those that come back may."""


CANCELLED, REJECTED = "cancelled", "rejected"
"""Outcomes of requests beside a `Finish`, for the metrics."""


class Generation:
    """One request in flight. A context manager: however it is left, the request is dropped here and at its engine."""

    def __init__(self, gateway: "Gateway", entry: Entry) -> None:
        """Made by `Gateway.open`."""
        self.entry = entry
        self.outcome = CANCELLED
        """What becomes of the request, for the metrics; the reader sets it when it has the whole answer."""
        self.last_arrival_s: float | None = None
        self._gateway = gateway
        self._changed = asyncio.Event()
        self._at_once: Callable[[], bool] | None = None
        self._error: Exception | None = None
        self._num_read = 0

    def __enter__(self) -> "Generation":
        """Nothing to do: the request is in flight since it was opened."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Drop the request."""
        self._gateway.drop(self)

    def wake(self) -> None:
        """Let the reader see what has changed in the entry."""
        try:
            if self._at_once is None or not self._at_once():
                self._changed.set()
        except Exception as error:  # noqa: BLE001 - a bug of this request's reader; the gateway serves others as well
            self._error = error
            self._changed.set()

    async def update(self, at_once: Callable[[], bool] | None = None) -> tuple[list[int], Finish]:
        """Wait for a change, and `read`.

        Args:
            at_once: called at each change while this waits, in the gateway's turn: it may read by itself, and goes on
                waiting by True. To wake a task for a token costs as much as all else that the gateway does with it.

        Raises:
            GenerationFailed: see `read`.
        """
        self._at_once = at_once
        await self._changed.wait()
        self._at_once = None
        self._changed.clear()
        if self._error is not None:
            raise self._error
        return self.read()

    def read(self) -> tuple[list[int], Finish]:
        """The tokens that were not read yet, maybe none; with the engine's `finish`: STOP or LENGTH, after which there
        are no more, else NOT_YET.

        Raises:
            GenerationFailed: the engine gave up, or (`Stopping`) the front end did.
        """
        entry = self.entry
        if entry.finish is Finish.ERROR:
            raise (Stopping if self._gateway.stopping else GenerationFailed)(entry.error)
        tokens = entry.tokens[self._num_read :]
        self._num_read += len(tokens)
        return tokens, entry.finish


class Gateway:
    """Owns the journal, the view and the links to its members. Everything runs in one event loop."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        metrics: Metrics,
        *,
        max_in_flight: int,
        node: int = 0,
        eplb_mode: str = "off",
        wire: Wire = PLAIN,
    ) -> None:
        """Start saying hello to engines (none before the first `set_view`).

        Args:
            tasks: where background work runs; a bug there ends the whole group. `close` ends the work.
            metrics: where requests and tokens are counted.
            max_in_flight: requests in flight before `open` refuses.
            node: the node this runs on.
            eplb_mode: how the engines balance their experts.
            wire: the launch's.
        """
        self.metrics = metrics
        self.stopping = ""
        """Why no request is taken any more; empty while they are."""
        self._max_in_flight = max_in_flight
        self._node = node
        self._name = f"node{node}-{secrets.token_hex(4)}"
        self._tasks = tasks
        self._context = zmq.asyncio.Context()
        self._wire = wire
        self._view: View | None = None
        self._links: dict[int, EngineLink] = {}
        self.balance = BalanceDesk(eplb_mode, self._links)
        """Rebalances that clients ask for, and loads."""
        self._listeners: dict[int, list[asyncio.Task[None]]] = {}
        self._journal = Journal()
        self.events = EventLog(metrics)
        """The recoveries that engines told of."""
        self._generations: dict[str, Generation] = {}
        self._has_started = False
        self._greeter = tasks.create_task(self._greet())

    def open(self, prompt: list[int], max_tokens: int, sampling: Sampling) -> Generation:
        """Take a request; it is given to a rank at once, or as soon as one is healthy.

        Raises:
            TooManyRequests: `max_in_flight` requests are in flight.
            Unavailable: no rank can serve, and it is not a matter of moments.
            Stopping: the front end is shutting down.
        """
        if self.stopping:
            raise Stopping(self.stopping)
        if why_not := self._why_not():
            self.metrics.requests.labels(REJECTED).inc()
            raise Unavailable(why_not)
        if len(self._journal) >= self._max_in_flight:
            self.metrics.requests.labels(REJECTED).inc()
            raise TooManyRequests(f"{self._max_in_flight} requests are in flight already; try again later")
        entry = Entry(secrets.token_hex(12), prompt, max_tokens, sampling, arrived_s=time.monotonic())
        generation = Generation(self, entry)
        self._journal.add(entry)
        self._generations[entry.request_id] = generation
        self.metrics.prompt_tokens.inc(len(prompt))
        self._place()
        return generation

    def drop(self, generation: Generation) -> None:
        """Forget a request; an engine that still works on it is told to cancel."""
        entry = generation.entry
        self._journal.remove(entry)
        del self._generations[entry.request_id]
        self.metrics.requests.labels(entry.finish if entry.finish is Finish.ERROR else generation.outcome).inc()
        if not entry.finish:
            self._cancel(entry)
        if entry.on_trial:
            self._place()

    def set_view(self, view: View) -> None:
        """Follow the group: link to new processes, unlink those that left, and move the requests they had."""
        if self._view is not None and view.epoch < self._view.epoch:
            return
        self._view = view
        members = {m.rank: m for m in view.members}
        for rank, link in tuple(self._links.items()):
            member = members.get(rank)
            if member is None or (member.incarnation, member.address) != (link.member.incarnation, link.member.address):
                self._unlink(rank)
        for rank in members.keys() - self._links.keys():
            link = self._links[rank] = EngineLink(self._context, members[rank], self._wire)
            self._listeners[rank] = [
                self._tasks.create_task(work) for work in (self._listen(link), self._notice_loss(link))
            ]
            link.send(Hello(self._name))
            self.balance.greet(link)
        orphans = self._journal.orphans(view)
        for entry in orphans:
            entry.orphan()
            if entry.finish:
                logger.error("request %s: %s", entry.request_id, entry.error)
                self._generations[entry.request_id].wake()
        logger.info("epoch %d: ranks %s; %d requests to move", view.epoch, list(view.ranks), len(orphans))
        self._ranks_changed()

    def status(self) -> ClusterStatus:
        """The cluster as seen from here, now."""
        now_s = time.monotonic()
        links = [self._links[rank] for rank in sorted(self._links)]
        members = tuple(MemberStatus.of(link.member, link.status, link.load(now_s).phase) for link in links)
        phase, reason = self._phase()
        num_waiting = len(self._journal.unplaced())
        return ClusterStatus(
            phase=phase,
            reason=reason,
            epoch=self._view.epoch if self._view else 0,
            node=self._node,
            placement=newest_placement(members),
            requests=RequestStatus(running=len(self._journal) - num_waiting, waiting=num_waiting),
            members=members,
        )

    def weights(self, model: str) -> InstanceWeights:
        """Who holds the weights of `model` now, for another instance that reads them.

        Raises:
            Unavailable: nobody does.
        """
        view = self._view
        if view is None:
            raise Unavailable("no rank has loaded the weights yet")
        placement = self.status().placement
        holders = [HolderAddress(m.weights, "engine", m.node, m.rank) for m in view.members if m.weights]
        holders += [HolderAddress(backup.address, "backup", backup.node) for backup in view.backups]
        key = self._wire.of_weights().secret
        return InstanceWeights(model, view.epoch, view.digest, placement.version, placement.hash, holders, key)

    def stop(self, reason: str) -> None:
        """Take no more requests, and end those in flight with an error that says why."""
        self.stopping = reason
        for generation in self._generations.values():
            if not generation.entry.finish:
                self._cancel(generation.entry)
                generation.entry.fail(reason)
                generation.wake()

    def close(self) -> None:
        """End the background work and close all links."""
        self._greeter.cancel()
        for rank in tuple(self._links):
            self._unlink(rank)
        self._context.destroy(linger=0)

    def _phase(self) -> tuple[Phase, str]:
        """The phase of the whole, and why it is not `serving`."""
        absent = self._absent_ranks()
        if self.stopping:
            return Phase.STOPPING, self.stopping
        if not self._links:
            return Phase.STARTING, "no engine has joined yet"
        if not self._has_started:
            return Phase.STARTING, f"these ranks are not serving yet: {', '.join(map(str, absent))}"
        if len(absent) == len(self._links):
            return Phase.UNAVAILABLE, self._why_not() or "no rank is serving"
        return Phase.SERVING, ""

    def _why_not(self) -> str:
        """Why the ranks cannot serve, as the first that says so does; empty when one serves, or all may soon."""
        if len(self._absent_ranks()) < len(self._links):
            return ""
        reports = [link.status for _, link in sorted(self._links.items()) if link.status]
        return next((report.reason for report in reports if report.phase is Phase.UNAVAILABLE), "")

    def _absent_ranks(self) -> list[int]:
        """Members of the view that cannot be given requests now."""
        now_s = time.monotonic()
        return [rank for rank, link in sorted(self._links.items()) if not link.load(now_s).healthy]

    def _ranks_changed(self) -> None:
        """After every new view and report: the group has started once all members serve; requests may have a place."""
        self._has_started = self._has_started or not self._absent_ranks()
        self._place()

    def _place(self) -> None:
        """Give every request that has no rank to one, as far as there are healthy ranks. A rank has one on trial at a
        time, or nobody could tell which it died of."""
        now_s = time.monotonic()
        for entry in self._journal.unplaced():
            taken = self._journal.ranks_with_a_trial() if entry.is_suspect else ()
            rank = choose_rank(link.load(now_s) for link in self._links.values() if link.member.rank not in taken)
            if rank is None:
                continue
            link = self._links[rank]
            if entry.num_submits:
                self.metrics.resubmitted.inc()
            link.send(entry.assign(Owner(rank, link.member.incarnation)))

    def _cancel(self, entry: Entry) -> None:
        """Tell the engine that works on an entry, if any, to stop."""
        link = self._links.get(entry.owner.rank) if entry.owner else None
        if link is not None:
            link.send(Cancel(entry.request_id))

    def _unlink(self, rank: int) -> None:
        for listener in self._listeners.pop(rank):
            listener.cancel()
        self._links.pop(rank).close()

    async def _greet(self) -> None:
        while True:
            for link in self._links.values():
                link.send(Hello(self._name))
            await asyncio.sleep(HELLO_INTERVAL_S)

    async def _listen(self, link: EngineLink) -> None:
        while True:
            message = await link.receive()
            if isinstance(message, Step):
                now_s = time.monotonic()
                self.metrics.generated_tokens.inc(sum([self._take(tokens, now_s) for tokens in message.tokens]))
            elif isinstance(message, Event):
                self.events.add(message)
                if isinstance(message.report, RebalanceReport):
                    self.balance.finish(message.report)
            elif isinstance(message, Loads):
                self.balance.take(link.member.rank, message)
            else:
                link.heard(message, time.monotonic())
                self._follow(message)
                self._ranks_changed()

    async def _notice_loss(self, link: EngineLink) -> None:
        while True:
            await link.lost()
            logger.info("the connection to rank %d has ended", link.member.rank)

    def _follow(self, status: Status) -> None:
        """An engine may know of a newer view before the supervisor says so (its own engine may be the dead one)."""
        if self._view is None or status.view.epoch > self._view.epoch:
            self.set_view(status.view)

    def _take(self, message: Tokens, now_s: float) -> int:
        """Enter new tokens into the journal and wake whoever reads them; returns how many there are."""
        entry = self._journal.addressee(message)
        if entry is None:
            return 0
        was_on_trial = entry.on_trial
        num_new = None if message.finish is Finish.DROPPED else entry.apply(message)
        if num_new is None:  # dropped, or tokens are missing before these: begin anew from those that are here
            logger.warning("request %s has to be submitted again after %d tokens", entry.request_id, len(entry.tokens))
            self._cancel(entry)
            entry.owner = None
            self._place()
            return 0
        if was_on_trial and not entry.on_trial:
            self._place()
        generation = self._generations[entry.request_id]
        if num_new:
            if generation.last_arrival_s is None:
                self.metrics.time_to_first_token.observe(now_s - entry.arrived_s)
            else:
                self.metrics.inter_token.observe(now_s - generation.last_arrival_s)
            generation.last_arrival_s = now_s
        generation.wake()
        return num_new
