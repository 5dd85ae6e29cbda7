"""A process that hangs: its main thread stands still for good, wherever it is, while its other threads run on.

As a read that never returns looks from outside, or a driver that does not answer; done by ptrace, so the process itself
needs to know nothing of it. Linux; whoever may trace the process (its own user, where the kernel does not forbid it).
"""

import ctypes
import os
import threading

from elastic_moe.background import start_thread

_SEIZE, _INTERRUPT = 0x4206, 0x4207
_ANY_THREAD = 0x40000000
"""__WALL of wait(2)."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def hang_main_thread(pid: int) -> None:
    """Stop the main thread of process `pid` until it is killed.

    Raises:
        ProcessLookupError: there is no such process.
        PermissionError: it may not be traced.
    """
    stopped = threading.Event()
    failed: list[BaseException] = []

    def trace() -> None:  # every call has to come from the thread that made the first
        try:
            _ptrace(_SEIZE, pid)
            _ptrace(_INTERRUPT, pid)
            os.waitpid(pid, _ANY_THREAD)
        except OSError as error:
            failed.append(error)
        stopped.set()
        while not failed:
            _, status = os.waitpid(pid, _ANY_THREAD)  # its parent hears of its death when this thread has
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                return

    start_thread(f"trace {pid}", trace, on_error=failed.append)
    stopped.wait()
    if failed:
        raise failed[0]


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot trace process {pid}: {os.strerror(number)}")
