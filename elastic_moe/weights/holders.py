"""Weights from processes that have them in memory: members of the group, backups, another instance.

Every holder is greeted and says what it has. Each thing is asked of the nearest that has it, of several alike the one
with the least to do; each holder has a few requests at once. What was received is verified; whoever does not answer in
time is asked no more, and what was to come from there comes from another.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import zmq

from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Member, View
from elastic_moe.weights.digest import digest
from elastic_moe.weights.holding import GiveDense, GiveExpert, Given, Holding, Request
from elastic_moe.weights.link import Link, greet
from elastic_moe.weights.sources import ORIGINS, Came, Landing, Missed, Origin, Source, Told, Until, Want
from elastic_moe.weights.store import UNKNOWN, ExpertStore
from elastic_moe.wire import PLAIN, Wire

IN_FLIGHT = 4
"""Requests that one holder has at once: it looks for the next while the last one travels."""
TURN_S = 0.2
"""After so long without any answer whoever waits is told so, and may give it up."""


class Holder(NamedTuple):
    """Where a holder is asked."""

    address: str
    """Its endpoint as it names it itself."""
    origin: Origin
    wire: Wire = PLAIN
    endpoint: str = ""
    """Where it is reached from here, if that is elsewhere."""


def other_members(view: View, me: Member, wire: Wire) -> list[Holder]:
    """All members of `view` but `me`, those of its node as nearer ones. `wire` is the launch's."""
    of_weights = wire.of_weights()
    return [
        Holder(member.weights, Origin.NODE if member.node == me.node else Origin.REMOTE, of_weights)
        for member in view.members
        if member.rank != me.rank and member.weights
    ]


class _Link(Link["_Job"]):
    """To one of them, with what it is to be asked for."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(holder.address, holder.wire, holder.endpoint)
        self.origin = holder.origin
        self.waiting: deque[_Job] = deque()

    @property
    def rank(self) -> tuple[int, int]:
        """The nearest first, then who has the least to do."""
        return ORIGINS.index(self.origin), len(self.waiting) + len(self.asked)


@dataclass(eq=False)
class _Job:
    """One thing that is wanted."""

    request: Request
    open: Callable[[], Sequence[torch.Tensor]]
    tried: set[_Link] = field(default_factory=set)
    is_right: bool = False


class _Arrived(NamedTuple):
    job: _Job
    origin: Origin
    digest: int


class Holders(Source):
    """Those of one instance, as a process sees them that wants its weights. For one thread."""

    def __init__(
        self,
        holders: Iterable[Holder],
        deadlines: Deadlines,
        form: str = "",
        find: Callable[[], Iterable[Holder]] | None = None,
        *,
        greet_s: float | None = None,
    ) -> None:
        """Greet all, and go on with those that answer and whose weights have the form `form`, if one is given.

        `find` tells who holds weights by now, or who else does: when something can be had of nobody, all are greeted
        once more, for what a group holds where changes all the time. By default they are the same. `greet_s`: seconds
        until the first has to answer; by default as long as any answer may take.
        """
        holders = list(holders)
        self._deadlines = deadlines
        self._form = form
        self._greet_s = deadlines.weights_s if greet_s is None else greet_s
        self._find = find or (lambda: holders)
        self._links: list[_Link] = []
        self.nearest = min((holder.origin for holder in holders), key=ORIGINS.index, default=Origin.NODE)
        self.refused: list[str] = []
        """The forms of those that have another one."""
        self.dense_bytes = 0
        """Bytes of dense tensors received and accepted."""
        self._greet(holders)
        if not self._links and find:
            self._greet(holder for holder in find() if holder not in holders)
        self._is_alone = not self._links

    @property
    def holdings(self) -> list[Holding]:
        """Of all that have answered."""
        return [link.holding for link in self._links]

    def tell_truth(self, store: ExpertStore) -> None:
        """Let the digests that the first of them knows be those of the group: instances may differ."""
        for holding in reversed(self.holdings):
            for layer, expert, said in holding.experts:
                if said != UNKNOWN:
                    store.digests[layer, expert] = said

    def dense(self, out: Mapping[str, torch.Tensor]) -> Iterator[str]:
        """Fill tensors with the dense ones of these names; yields each name whose tensor is right: as the first holder
        says that has it."""
        right = {name: dense.digest for holding in reversed(self.holdings) for name, dense in holding.dense.items()}
        names = {name: _Job(GiveDense(name), lambda tensor=tensor: [tensor]) for name, tensor in out.items()}
        of_job = {job: name for name, job in names.items()}
        for arrived in self._bring(list(names.values()), Until()):
            for job, _, said in arrived:
                tensor = out[of_job[job]]
                if digest([tensor]) == said == right[of_job[job]]:
                    job.is_right = True
                    self.dense_bytes += tensor.numel() * tensor.element_size()
                    yield of_job[job]

    def fetch(self, wants: Sequence[Want], landing: Landing, until: Until) -> Iterator[Told]:
        """See `Source.fetch`."""
        jobs = {_Job(GiveExpert(w.layer, w.expert), lambda want=w: landing.open(want)): w for w in wants}
        for arrived in self._bring(list(jobs), until):
            yield [Came(jobs[job], origin, said) for job, origin, said in arrived]
            for job, *_ in arrived:
                job.is_right = landing.has(jobs[job])
        if lacking := [want for job, want in jobs.items() if not job.is_right]:
            yield [Missed(want, f"none of {len(self._links)} holders that answer has it right") for want in lacking]

    def close(self) -> None:
        """Disconnect."""
        for link in self._links:
            link.close()
        self._links.clear()

    def _greet(self, holders: Iterable[Holder]) -> None:
        links = [_Link(holder) for holder in holders]
        for link in greet(links, self._greet_s, self._deadlines.greeting_s):
            if self._form and link.holding.form != self._form:
                self.refused.append(link.holding.form)
            else:
                self._links.append(link)
        for link in links:
            if link not in self._links:
                link.close()

    def _bring(self, jobs: Sequence[_Job], until: Until) -> Iterator[list[_Arrived]]:
        """Tells of what has come by a moment, often of nothing. Who is told sets `is_right`; what is not is asked of
        another, and of all once more after a new greeting: what changes while it is read has another digest, and may be
        right the next time."""
        left = list(jobs)
        for chance in range(2):
            if chance and left and until.left_s and not self._is_alone:
                self.close()
                self._greet(self._find())
            self._assign(left)
            while busy := [link for link in self._links if link.asked or link.waiting]:
                for link in busy:
                    while link.waiting and len(link.asked) < IN_FLIGHT:
                        link.ask(link.waiting[0].request, link.waiting.popleft())
                arrived, again = self._receive(busy, until)
                yield arrived
                self._assign([*again, *(job for job, *_ in arrived if not job.is_right)])
            left = [job for job in left if not job.is_right]

    def _assign(self, jobs: Iterable[_Job]) -> None:
        """Of whom each is asked; of nobody if all who have it were asked already."""
        for job in jobs:
            able = [link for link in self._links if link not in job.tried and link.has(job.request)]
            if able:
                link = min(able, key=lambda link: link.rank)
                job.tried.add(link)
                link.waiting.append(job)

    def _receive(self, busy: Sequence[_Link], until: Until) -> tuple[list[_Arrived], list[_Job]]:
        """What has come, and what has to be asked of another. Who is silent for too long is left."""
        answer_s = self._deadlines.weights_s
        now = time.monotonic()
        wait_s = min(TURN_S, until.left_s, *(link.since + answer_s - now for link in busy))
        poller = zmq.Poller()
        for link in busy:
            poller.register(link.socket, zmq.POLLIN)
        ready = {socket for socket, _ in poller.poll(max(0, int(1000 * wait_s)))}
        arrived, again, is_over = [], [], not until.left_s
        for link in busy:
            if link.socket in ready:
                job, answer, frames = link.receive()
                if job is None:
                    continue
                if isinstance(answer, Given) and _fill(job.open(), answer, frames):
                    arrived.append(_Arrived(job, link.origin, answer.digest))
                else:  # it has it no more, or never as it is wanted
                    again.append(job)
            elif is_over or time.monotonic() - link.since > answer_s:
                again += [job for job, _ in link.asked if job is not None]
                again += link.waiting
                link.close()
                self._links.remove(link)
        return arrived, again


def _fill(out: Sequence[torch.Tensor], given: Given, frames: Sequence[zmq.Frame]) -> bool:
    """Whether that is what was wanted, and is there now."""
    sizes = [t.numel() * t.element_size() for t in out]
    if ([str(t.dtype) for t in out], [list(t.shape) for t in out]) != (given.dtypes, given.shapes):
        return False
    if [len(frame) for frame in frames] != sizes:
        return False
    for tensor, frame in zip(out, frames, strict=True):
        _write(tensor.detach(), frame.buffer)
    return True


def _write(tensor: torch.Tensor, data: memoryview) -> None:
    straight = tensor.device.type == "cpu" and tensor.is_contiguous()
    host = tensor if straight else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    host.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(data, dtype=np.uint8)
    if not straight:
        tensor.copy_(host)
