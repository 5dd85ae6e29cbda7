"""The supervisor of one rank: it keeps a process in the seat, tells the others when that dies, and starts it again."""

import secrets
import sys
import time
from collections.abc import Callable

from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Backup, View, incarnation_of
from elastic_moe.membership.launch import Launch, SeatStart, host_of
from elastic_moe.membership.signals import PeerDied, SignalSender
from elastic_moe.supervision.busy import busy_ns
from elastic_moe.supervision.channel import Beat, Refused, ViewChanged
from elastic_moe.supervision.ports import lasting_port
from elastic_moe.supervision.supervisor import (
    Child,
    Event,
    EventKind,
    Supervisor,
    complain,
    end_with_parent,
    raise_file_limit,
)
from elastic_moe.supervision.watch import MAX_BACKOFF_S, RESPAWN_S, HangWatch, Respawns, ServiceHealth

POLL_S = 0.1
"""How often a supervisor looks whether a process hangs or is to be started, when nothing happens."""
FILES, FILES_PER_RANK = 200, 12
"""Open files of an engine (libraries, its own sockets), and for each peer (two gloo groups, two of the balancer,
their duplicates for an abort, signals)."""
SEAT, LIGHTHOUSE, BACKUP, SPARE = "process", "lighthouse", "backup", "spare process"
OPTIONAL = (BACKUP, SPARE)
"""Services that a launch goes on without."""


class RankSupervisor:
    """Owns the children of one rank. `run` returns the exit code when the launch is over for this rank."""

    def __init__(self, launch: Launch, deadlines: Deadlines, max_quick_deaths: int, *, keeps_lighthouse: bool) -> None:
        """`max_quick_deaths`: see `Respawns`; `keeps_lighthouse`: start one beside this rank, on this host."""
        self._launch = launch
        self._deadlines = deadlines
        self._supervisor = Supervisor()
        self._sender = SignalSender(launch.wire)
        host = host_of(launch)
        self._signals_port = lasting_port(host)
        self._lighthouse = f"http://{host}:{lasting_port(host)}" if keeps_lighthouse else ""
        self._backup: Backup | None = None
        """The node's, if it runs beside this rank."""
        self._proof = ""
        """Of the present process, for its death."""
        self._view: View | None = None
        self._refused = ""
        self._joined_at: float | None = None
        self._has_process = False
        self._respawn_at: float | None = None
        self._services_due: dict[str, float] = {}
        self._health: dict[str, ServiceHealth] = {}
        self._respawns = Respawns(max_quick_deaths)
        self._hang_watch = HangWatch(deadlines)

    def run(self) -> int:
        """Keep the children going until a signal comes, the rank cannot start, or its work is done."""
        if self._launch.store:
            end_with_parent()  # torchrun's agent
        needed = FILES + FILES_PER_RANK * self._launch.world_size
        if raise_file_limit() < needed:
            complain(
                f"rank {self._launch.rank}: it may run out of open files: ulimit -n is to be {needed} or more", None
            )
        for name in self.services():
            self._start_service(name)
        self._start_process()
        try:
            while (code := self._turn()) is None:
                pass
        finally:
            self._supervisor.stop()
            self._sender.close()
        return code

    def start_process(self, start: SeatStart) -> Child:
        """Start the process of this rank, named `SEAT`, and tell it who it is."""
        raise NotImplementedError

    def services(self) -> dict[str, Callable[[], Child]]:
        """What stands beside the rank: by name, how it is started. Each is started again when it dies."""
        return {LIGHTHOUSE: self._start_lighthouse} if self._lighthouse else {}

    def on_view(self, view: View) -> None:
        """The members of the group have changed."""

    def on_message(self, event: Event) -> None:
        """A child says something of no concern to the seat."""

    def is_loss(self) -> bool:
        """Whether the others lose a member when the process ends now."""
        return True

    def on_exit(self, code: int) -> int | None:
        """The process has exited. Returns the exit code if this rank does too, else it is started again."""
        if self._refused and self._view is None:
            return 2
        if self._view is None:
            complain(f"rank {self._launch.rank}: the process died with code {code} before it joined the group", None)
            return 1
        return None

    def starts_at_once(self) -> bool:
        """Whether a process is there that only waits to be told who it is."""
        return False

    def others_serve(self) -> bool:
        """Whether another rank does the work of the group, so that this one may go on trying."""
        return False

    def _turn(self) -> int | None:
        event = self._supervisor.next_event(POLL_S)
        now = time.monotonic()
        if event is not None and (code := self._act(event, now)) is not None:
            return code
        if self._respawn_at is not None and now >= self._respawn_at:
            self._start_process()
        for name in [name for name, at in self._services_due.items() if now >= at]:
            self._start_service(name)
        self._watch(now)
        return None

    def _act(self, event: Event, now: float) -> int | None:
        match event.kind:
            case EventKind.SIGNAL:
                return 0
            case EventKind.MESSAGE:
                self._hear(event, now)
            case EventKind.DYING:
                if event.child == SEAT and self.is_loss():
                    self._announce_death()
            case EventKind.EXIT:
                if event.child == SEAT:
                    return self._replace(event.code, now)
                return self._replace_service(event, now)
        return None

    def _replace(self, code: int, now: float) -> int | None:
        """The process has exited with `code`. Returns the exit code if this rank does too."""
        self._has_process = False
        if (end := self.on_exit(code)) is not None:
            return end
        served_s = 0.0 if self._joined_at is None else now - self._joined_at
        wait_s = self._respawns.after_death(served_s)
        if wait_s == RESPAWN_S and self.starts_at_once():
            wait_s = 0.0
        why = self._refused or f"the process died with code {code}"
        if (self._respawns.is_hopeless or self._refused) and not self.others_serve():
            why = self._refused or self._respawns.reason
            complain(f"rank {self._launch.rank}: {why}, and no other rank serves: the launch ends", None)
            return 1
        if self._refused:  # of what it cannot serve with now; somebody may mend it
            self._refused, wait_s = "", MAX_BACKOFF_S
        self._respawn_at = now + wait_s
        complain(f"rank {self._launch.rank}: {why}; respawn in {wait_s:g} s", None)
        return None

    def _replace_service(self, event: Event, now: float) -> int | None:
        """A service has exited: it is started again, later if it dies at its start. Returns the exit code if it can
        never work."""
        name, health = event.child, self._health[event.child]
        if health.refused and not health.has_worked:
            self._refused = health.refused
            return 2
        why, wait_s = health.refused or f"died with code {event.code}", health.after_death(now)
        complain(f"node {self._launch.node}: the {name}: {why}; started again in {wait_s:g} s", None)
        if health.is_hopeless and name not in OPTIONAL:
            return 1
        self._services_due[name] = now + wait_s
        return None

    def start_later(self, name: str, seconds: float) -> None:
        """Start a service so many seconds from now."""
        self._services_due[name] = time.monotonic() + seconds

    def _start_service(self, name: str) -> None:
        self._services_due.pop(name, None)
        self._health.setdefault(name, ServiceHealth()).begin(time.monotonic())
        self.services()[name]()

    def _hear(self, event: Event, now: float) -> None:
        if event.child != SEAT:
            self._health[event.child].hear(event.message)
            self.on_message(event)
            return
        match event.message:
            case Beat() as beat:
                self._hang_watch.hear(beat, now)
            case ViewChanged(view=view):
                self._view = view
                self._joined_at = self._joined_at or now
                self._sender.connect(m.signals for m in view.members if m.rank != self._launch.rank)
                self.on_view(view)
            case Refused(reason=reason):
                self._refused = reason
            case _:
                self.on_message(event)

    def _announce_death(self) -> None:
        """Tell all members, in milliseconds, that this rank's process died."""
        members = self._view.members if self._view else ()
        others = [m.signals for m in members if m.rank != self._launch.rank]
        if len(others) < len(members):
            self._sender.tell(others, PeerDied(self._launch.rank, self._proof))

    def _watch(self, now: float) -> None:
        """Kill a process that is alive but gets nowhere."""
        process = self._supervisor.children.get(SEAT)
        if process is None or not self._has_process:
            return
        if how := self._hang_watch.verdict(now, busy_ns(process.pid)):
            complain(f"rank {self._launch.rank}: the process (pid {process.pid}) is {how}; killing it", None)
            self._hang_watch.begin(now)
            process.kill()

    def _start_process(self) -> None:
        self._respawn_at, self._joined_at, self._has_process = None, None, True
        self._hang_watch.begin(time.monotonic())
        self._proof = secrets.token_hex(16)
        name = incarnation_of(self._proof)
        start = SeatStart(
            self._launch,
            lighthouse=self._lighthouse,
            backup=self._backup,
            signals_port=self._signals_port,
            incarnation=name,
            rejoin=self._view,
        )
        self.start_process(start)

    def _start_lighthouse(self) -> Child:
        wait_ms, beat_ms = self._deadlines.lighthouse_wait_s * 1000, self._deadlines.heartbeat_timeout_s * 1000
        command = [sys.executable, "-m", "elastic_moe.supervision.lighthouse"]
        command += ["--bind", self._lighthouse.removeprefix("http://")]
        command += ["--join-timeout-ms", f"{wait_ms:.0f}", "--heartbeat-timeout-ms", f"{beat_ms:.0f}"]
        return self._supervisor.start(LIGHTHOUSE, command)
