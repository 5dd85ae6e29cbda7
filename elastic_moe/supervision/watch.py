"""What a supervisor decides about the process in its seat: whether it hangs, and when it is started again.

No clock in here: every question says what time it is.
"""

import math

from elastic_moe.deadlines import Deadlines
from elastic_moe.supervision.busy import Busy
from elastic_moe.supervision.channel import Beat, Ready, Refused

QUICK_DEATH_S = 10.0
"""A process that was a member for less than this, or never, died quickly."""
RESPAWN_S = 2.0
"""Wait before a respawn: starting takes whole cores for seconds; first the survivors recover and catch up."""
BACKOFF_S = 1.0
"""Wait before the second respawn in a row after quick deaths; doubles with each."""
MAX_BACKOFF_S = 60.0
MAX_STARTS = 3
"""A service that dies at its start so often, and once more, will not work."""
STILL = 0.05
"""Who is busy for a smaller part of the time stands still: a thread that only looks whether it may go on is, for less
than a hundredth."""


class _Stillness:
    """Since when something stands still, by how long it has been busy."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None

    def seconds(self, now: float, busy_ns: int) -> float:
        """How long it has stood still at `now`."""
        if self._since is None or busy_ns - self._since[1] > STILL * (now - self._since[0]) * 1e9:
            self._since = now, busy_ns
        return now - self._since[0]


class HangWatch:
    """Judges a process by its beats, and by whether it is busy.

    A process says how soon it will make progress: it depends on what it does. When it does not, and stands still
    besides, it hangs. One that is busy all the while (a long step, a machine with too much to do) gets `hang_s`.
    """

    def __init__(self, deadlines: Deadlines) -> None:
        """`deadlines.hang_s` None: only a process that stands still hangs."""
        self._hang_s = deadlines.hang_s or math.inf
        self._still_s = deadlines.progress_s
        self._start_s = deadlines.start_s
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Another process is in the seat."""
        self._beat: Beat | None = None
        self._began = self._beat_at = self._progress_at = now
        self._main, self._all = _Stillness(), _Stillness()

    def hear(self, beat: Beat, now: float) -> None:
        """`beat` came at `now`."""
        if beat != self._beat or beat.within_s is None:
            self._progress_at = now
        self._beat, self._beat_at = beat, now

    def verdict(self, now: float, busy: Busy | None) -> str:
        """How the process hangs, for people; empty if it does not. To be asked again and again."""
        main_s = self._main.seconds(now, busy.main) if busy else 0.0
        all_s = self._all.seconds(now, busy.all) if busy else 0.0
        if self._beat is None:
            loading_s = now - self._began
            return f"without its first beat for {loading_s:.1f} s" if loading_s > self._start_s else ""
        silent_s, idle_s = now - self._beat_at, now - self._progress_at
        if silent_s > self._hang_s or min(silent_s, all_s) > self._still_s:
            return f"without a beat for {silent_s:.1f} s"
        within_s = self._beat.within_s
        if within_s is not None and (min(idle_s, main_s) > within_s or idle_s > max(within_s, self._hang_s)):
            return f"without progress for {idle_s:.1f} s"
        return ""


class Respawns:
    """Counts quick deaths in a row."""

    def __init__(self, max_quick_deaths: int) -> None:
        """With more than `max_quick_deaths` in a row a rank is hopeless: the launch ends unless another one serves."""
        self._max_quick_deaths = max_quick_deaths
        self._quick_deaths = 0

    def after_death(self, served_s: float) -> float:
        """Seconds until the next start, after a process that was a member for so long."""
        self._quick_deaths = self._quick_deaths + 1 if served_s < QUICK_DEATH_S else 0
        return min(MAX_BACKOFF_S, max(RESPAWN_S, BACKOFF_S * 2 ** (self._quick_deaths - 2)))

    @property
    def is_hopeless(self) -> bool:
        """Whether it died quickly too often."""
        return self._quick_deaths > self._max_quick_deaths

    @property
    def reason(self) -> str:
        """What is wrong with the rank."""
        return f"it died {self._quick_deaths} times in a row, each within {QUICK_DEATH_S:.0f} s"


class ServiceHealth:
    """What became of a process that stands beside a rank, over its lives."""

    def __init__(self) -> None:
        """It has not been started yet."""
        self.refused = ""
        """Why the present one cannot work, if it says so."""
        self.has_worked = False
        """Whether one ever was at work."""
        self._began = 0.0
        self._quick_deaths = 0

    def begin(self, now: float) -> None:
        """It is started."""
        self._began, self.refused = now, ""

    def hear(self, message: object) -> None:
        """It says something."""
        self.has_worked = self.has_worked or isinstance(message, Ready)
        if isinstance(message, Refused):
            self.refused = message.reason

    def after_death(self, now: float) -> float:
        """Seconds until the next start: none after a long life."""
        self._quick_deaths = self._quick_deaths + 1 if now - self._began < QUICK_DEATH_S else 0
        return min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (self._quick_deaths - 1)) if self._quick_deaths > 1 else 0.0

    @property
    def is_hopeless(self) -> bool:
        """Whether it died again and again, and never came to work."""
        return not self.has_worked and self._quick_deaths > MAX_STARTS
