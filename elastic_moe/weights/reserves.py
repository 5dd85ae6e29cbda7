"""Where an expert comes from that no live rank holds: memory outside of the group, then the disks of its ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from elastic_moe.deadlines import Deadlines
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.pulse import Pulse
from elastic_moe.weights.disk import Disk, OtherDisks
from elastic_moe.weights.holders import Holder, Holders
from elastic_moe.weights.sources import Landing, Origin, Source, Told, Until, Want
from elastic_moe.weights.store import ExpertStore


class FoundHolders(Source):
    """Holders outside of the group, found and greeted whenever something is lacking."""

    def __init__(
        self,
        nearest: Origin,
        find: Callable[[], Iterable[Holder]],
        deadlines: Deadlines,
        form: str,
        pulse: Pulse,
        *,
        greet_s: float | None = None,
    ) -> None:
        """`find` names them; it and their answers are waited for, as `pulse` is told. `greet_s`: see `Holders`."""
        self.nearest = nearest
        self._greet_s = greet_s
        self._find = find
        self._deadlines = deadlines
        self._form = form
        self._pulse = pulse

    def fetch(self, wants: Sequence[Want], landing: Landing, until: Until) -> Iterator[Told]:
        """See `Source.fetch`."""
        with self._pulse.expects(self._deadlines.wait_s):
            found = list(self._find())
            if not found:
                return
            holders = Holders(found, self._deadlines, self._form, greet_s=self._greet_s)
        try:
            for told in holders.fetch(wants, landing, until):
                self._pulse.beat()
                yield told
        finally:
            holders.close()


@dataclass(frozen=True)
class Reserves:
    """Of one rank."""

    disk: Disk | None = None
    """The checkpoint, if there is one."""
    memory: Sequence[Source] = ()
    """In any order."""

    def __bool__(self) -> bool:
        return self.disk is not None or bool(self.memory)

    @property
    def own(self) -> list[Source]:
        """What this rank asks by itself."""
        return [*self.memory, *([self.disk] if self.disk else [])]

    def all(self, store: ExpertStore, groups: EpochGroups) -> list[Source]:
        """With those that a group asks together: `store` and `groups` are this rank's."""
        return [*self.own, *([OtherDisks(self.disk, store, groups)] if self.disk else [])]
