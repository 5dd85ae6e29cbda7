"""The journal of a front end: every request in flight, its prompt and the tokens it already has.

It is what makes the loss of a rank harmless: prompt and tokens so far are all another rank needs to go on. Plain
data and rules; sockets, clocks and waiting are the gateway's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from elastic_moe.group.view import View
from elastic_moe.serving.protocol import Finish, Sampling, Submit, Tokens

SUSPECT_AFTER = 2
"""A request that so many processes in a row died under, without one more token, runs alone next. When that one dies too
the request ends with an error; until then nobody can tell it from its neighbours, or from one who had bad luck."""


class Owner(NamedTuple):
    """The engine process that works on a request."""

    rank: int
    incarnation: str


@dataclass(eq=False)
class Entry:
    """One request, from its arrival until its client has the answer or has gone."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    arrived_s: float
    tokens: list[int] = field(default_factory=list)
    owner: Owner | None = None
    """None while no rank works on it: not placed yet, or orphaned."""
    num_submits: int = 0
    num_deaths: int = 0
    """Owners in a row that were lost before its next token."""
    on_trial: bool = False
    """Whether its owner runs it alone, and its next token has not come yet."""
    finish: Finish = Finish.NOT_YET
    """Whether more tokens will come."""
    error: str = ""

    def assign(self, owner: Owner) -> Submit:
        """Give the request to `owner`: the message that lets it go on from the tokens it has."""
        self.owner = owner
        self.num_submits += 1
        self.on_trial = self.is_suspect
        return Submit(
            request_id=self.request_id,
            tokens=self.prompt + self.tokens,
            num_generated=len(self.tokens),
            max_new_tokens=self.max_tokens - len(self.tokens),
            sampling=self.sampling,
            alone=self.on_trial,
        )

    @property
    def is_suspect(self) -> bool:
        """Whether it has to run alone."""
        return self.num_deaths >= SUSPECT_AFTER

    def orphan(self) -> None:
        """Its owner was lost: another goes on with it, unless it is what kills them."""
        if self.on_trial:
            self.fail(f"{self.num_deaths + 1} processes died while they ran this request, the last one ran no other")
        self.owner, self.on_trial = None, False
        self.num_deaths += 1

    def apply(self, message: Tokens) -> int | None:
        """Take what is new of `message`, by position; returns how many tokens that is, None for a gap.

        Tokens already known are dropped. A gap cannot be filled, so nothing after it is taken.
        """
        known = len(self.tokens)
        if message.start > known:
            return None
        self.tokens += message.tokens[known - message.start :][: self.max_tokens - known]
        self.finish, self.error = message.finish, message.error
        if len(self.tokens) > known or self.finish:
            self.num_deaths, self.on_trial = 0, False
        if not self.finish and len(self.tokens) == self.max_tokens:
            self.finish = Finish.LENGTH
        return len(self.tokens) - known

    def fail(self, reason: str) -> None:
        """End the request with an error."""
        self.finish, self.error = Finish.ERROR, reason


class Journal:
    """The requests in flight, in order of arrival."""

    def __init__(self) -> None:
        """An empty journal."""
        self._entries: dict[str, Entry] = {}

    def __len__(self) -> int:
        """Requests in flight, those included whose answer is still being sent."""
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Every entry, oldest first."""
        return iter(tuple(self._entries.values()))

    def add(self, entry: Entry) -> None:
        """Record a new request."""
        self._entries[entry.request_id] = entry

    def remove(self, entry: Entry) -> None:
        """Forget a request."""
        del self._entries[entry.request_id]

    def addressee(self, message: Tokens) -> Entry | None:
        """The unfinished entry that `message` is for, if it comes from the entry's present owner.

        None for late messages: of a request that has ended, or of a former owner.
        """
        entry = self._entries.get(message.request_id)
        if entry is None or entry.finish or entry.owner is None:
            return None
        return entry if entry.owner.incarnation == message.incarnation else None

    def orphans(self, view: View) -> list[Entry]:
        """Unfinished entries whose owner is not a member of `view`, oldest first: another rank must go on with them."""
        members = {Owner(m.rank, m.incarnation) for m in view.members}
        return [e for e in self if e.owner is not None and e.owner not in members and not e.finish]

    def unplaced(self) -> list[Entry]:
        """Unfinished entries that no rank works on, oldest first."""
        return [e for e in self if e.owner is None and not e.finish]

    def ranks_with_a_trial(self) -> set[int]:
        """Ranks that run a request alone."""
        return {e.owner.rank for e in self if e.owner is not None and e.on_trial}
