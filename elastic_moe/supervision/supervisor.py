"""The supervisor: the process torchrun starts, and the one that must not die.

It is small and loads no torch. Here are its parts: a child with a channel, and the events of all children.
"""

import contextlib
import ctypes
import enum
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from elastic_moe.background import start_thread
from elastic_moe.supervision.channel import channel_pair

STOP_GRACE_S = 3.0
"""How long children may take to end after SIGTERM before they are killed."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class EventKind(enum.StrEnum):
    """What a supervisor acts on."""

    SIGNAL = "signal"
    """A signal to the supervisor itself, number `code`."""
    MESSAGE = "message"
    """`message` of a child."""
    DYING = "dying"
    """The kernel has closed a child's channel, so it runs no more; but it may take a while to take it down (0.1 to
    0.2 s for one with memory on a GPU)."""
    EXIT = "exit"
    """A child has exited with `code`, or died of signal `-code`."""


class Event(NamedTuple):
    """Something a supervisor acts on; `child` is the name of the child that it comes from."""

    kind: EventKind
    child: str = ""
    message: object | None = None
    code: int = 0


class Child:
    """One child process and the channel to it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        events: "queue.SimpleQueue[Event]",
        pass_fds: Sequence[int] = (),
        fd_variable: str = "",
    ) -> None:
        """Start `command` with ` --supervisor-fd N` appended, or with N in the environment as `fd_variable`; its
        messages and its end go to `events`.

        The child dies when this process does: it reads the end of file, and the kernel kills it should it not.
        """
        self._name = name
        self.channel, theirs = channel_pair()
        parent = os.getpid()

        def die_with_parent() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        with theirs:
            fd = str(theirs.fileno())
            self._process = subprocess.Popen(  # noqa: S603 - the command is our own
                list(command) if fd_variable else [*command, "--supervisor-fd", fd],
                env={**os.environ, fd_variable: fd} if fd_variable else None,
                pass_fds=(theirs.fileno(), *pass_fds),
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._outbox: dict[type, msgspec.Struct] = {}
        self._outbox_changed = threading.Condition()
        self._is_over = False
        start_thread(f"watch {name}", self._watch, events, on_error=lambda _error: self._give_up(events))
        start_thread(f"write {name}", self._write, on_error=lambda _error: self.kill())

    @property
    def is_alive(self) -> bool:
        """Whether its channel was open when last looked at."""
        return not self._is_over

    def rename(self, name: str) -> bool:
        """Have what it says from now on come from `name`. False when it has died: that comes from its old one."""
        with self._outbox_changed:
            if not self._is_over:
                self._name = name
            return not self._is_over

    def send(self, message: msgspec.Struct) -> None:
        """Send a message without waiting. While the child does not read, only the newest of each kind is kept."""
        with self._outbox_changed:
            self._outbox[type(message)] = message
            self._outbox_changed.notify()

    def _write(self) -> None:
        while True:
            with self._outbox_changed:
                self._outbox_changed.wait_for(lambda: self._outbox or self._is_over)
                if self._is_over:
                    return
                message = self._outbox.pop(next(iter(self._outbox)))
            if not self.channel.send(message):
                return

    def _watch(self, events: "queue.SimpleQueue[Event]") -> None:
        """Pass its messages on until it dies. The end of the channel says so first; but who was forked from the child
        may hold that open, and then the kernel's word of the process itself comes in time."""
        life = os.pidfd_open(self._process.pid)
        poll = select.poll()
        poll.register(self.channel.fileno(), select.POLLIN)
        poll.register(life, select.POLLIN)
        try:
            alive = True
            while alive:
                alive = life not in [fd for fd, _ in poll.poll()]
                with contextlib.suppress(BlockingIOError):
                    while (message := self.channel.receive(wait=False)) is not None:
                        events.put(Event(EventKind.MESSAGE, self._name, message))
                    alive = False
        finally:
            os.close(life)
        self._tell_death(events)

    def _tell_death(self, events: "queue.SimpleQueue[Event]") -> None:
        with self._outbox_changed:
            self._is_over = True
            self._outbox_changed.notify()
        events.put(Event(EventKind.DYING, self._name))
        events.put(Event(EventKind.EXIT, self._name, code=self._process.wait()))

    def _give_up(self, events: "queue.SimpleQueue[Event]") -> None:
        """It says what nobody understands: kill it, or nobody would hear of its death."""
        self.kill()
        self._tell_death(events)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def kill(self) -> None:
        """Kill it now; its end comes as an event."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def terminate(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def end(self, deadline: float) -> None:
        """Wait until `deadline` (time.monotonic), then kill it with its whole session."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Supervisor:
    """Starts, watches and ends children; signals arrive as events."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.children: dict[str, Child] = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda got, _frame: self.events.put(Event(EventKind.SIGNAL, code=got)))

    def start(self, name: str, command: Sequence[str], pass_fds: Sequence[int] = (), fd_variable: str = "") -> Child:
        """Start a child, or start it again; see `Child`."""
        child = self.children[name] = Child(name, command, self.events, pass_fds, fd_variable)
        return child

    def promote(self, name: str, to: str) -> Child | None:
        """Let the child `name` be the child `to` from now on. None when there is none that lives."""
        child = self.children.get(name)
        if child is None or not child.rename(to):
            return None
        del self.children[name]
        self.children[to] = child
        return child

    def has(self, name: str) -> bool:
        """Whether there is such a child, and it lives."""
        child = self.children.get(name)
        return child is not None and child.is_alive

    def next_event(self, timeout_s: float) -> Event | None:
        """Wait for the next event; None when there is none in time."""
        try:
            return self.events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def stop(self) -> None:
        """End all children: SIGTERM, `STOP_GRACE_S` seconds, SIGKILL."""
        deadline = time.monotonic() + STOP_GRACE_S
        for child in reversed(self.children.values()):
            child.terminate()
        for child in self.children.values():
            child.end(deadline)


def complain(line: str, folder: Path | None) -> None:
    """Print one line about a user's mistake, once although every rank finds the same, each at its own time.

    Of the processes that share `folder`, the first to put its claim there prints; with None every caller does.
    """
    if folder is not None:
        try:
            (folder / "elastic_moe_complaint").touch(exist_ok=False)
        except FileExistsError:
            return
    sys.stderr.write(f"elastic_moe: {line}\n")
    sys.stderr.flush()


def raise_file_limit() -> int:
    """Let this process and its children have as many open files as they may; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # without a limit, of what the kernel has
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize


def end_with_parent() -> None:
    """Have this process get SIGTERM when its parent dies: of torchrun's agent nothing must be left."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
