"""What a supervisor decides about the process in its seat: whether it hangs, and when it is started again.

No clock in here: every question says what time it is.
"""

from elastic_moe.supervision.channel import Beat

QUICK_DEATH_S = 60.0
"""A process that dies within this many seconds of its start died quickly."""
RESPAWN_S = 2.0
"""Wait before a respawn: starting takes whole cores for seconds; first the survivors recover and catch up."""
BACKOFF_S = 1.0
"""Wait before the second respawn in a row after quick deaths; doubles with each."""


class HangWatch:
    """Judges a process by its beats. Before the first one it may take any time: it loads."""

    def __init__(self, hang_s: float) -> None:
        """`hang_s`: a process without a beat, or without progress while it works, for longer than this hangs."""
        self._hang_s = hang_s
        self._beat: Beat | None = None
        self._beat_at = self._progress_at = 0.0

    def forget(self) -> None:
        """Another process is in the seat, or none."""
        self._beat = None

    def hear(self, beat: Beat, now: float) -> None:
        """`beat` came at `now`."""
        if self._beat is None or not beat.working or beat.progress != self._beat.progress:
            self._progress_at = now
        self._beat, self._beat_at = beat, now

    def verdict(self, now: float) -> str:
        """How the process hangs, for people; empty if it does not."""
        if self._beat is None:
            return ""
        for seconds, what in ((now - self._beat_at, "a beat"), (now - self._progress_at, "progress")):
            if seconds > self._hang_s:
                return f"without {what} for {seconds:.1f} s"
        return ""


class Respawns:
    """Counts quick deaths in a row."""

    def __init__(self, max_quick_deaths: int) -> None:
        """`max_quick_deaths` may follow each other; with one more the rank is given up."""
        self._max_quick_deaths = max_quick_deaths
        self._quick_deaths = 0

    def after_death(self, lived_s: float) -> float | None:
        """Seconds until the next start, after a process that lived so long; None: the rank is given up."""
        self._quick_deaths = self._quick_deaths + 1 if lived_s < QUICK_DEATH_S else 0
        if self._quick_deaths > self._max_quick_deaths:
            return None
        return max(RESPAWN_S, BACKOFF_S * 2 ** (self._quick_deaths - 2))

    @property
    def reason(self) -> str:
        """Why the rank is given up."""
        return f"it died {self._quick_deaths} times within {QUICK_DEATH_S:.0f} s of its start"
