"""`torchrun ... -m elastic_moe.supervise SCRIPT [ARGS ...]`: run a script on each rank, and again when it dies.

torchrun stops all its processes when one of them dies, so the process it starts must not be the one that may die.
This one starts SCRIPT as its child with the same environment. A script that joins by `ElasticRuntime.join(
Launch.from_torchrun(os.environ))` survives the death of any rank: the others go on at once, and the script of that rank
is started again and taken in. Exit code 0 ends the rank; a script that dies before it joined, or again and again, ends
the launch.
"""

import argparse
import os
import sys
from pathlib import Path

from elastic_moe.config import ElasticConfig
from elastic_moe.deadlines import Deadlines
from elastic_moe.membership.launch import SUPERVISOR_FD, Launch, SeatStart
from elastic_moe.supervision.channel import Done
from elastic_moe.supervision.rank_supervisor import SEAT, RankSupervisor
from elastic_moe.supervision.supervisor import Child, Event


class ScriptSupervisor(RankSupervisor):
    """Keeps a user's script in the seat; each node's first rank has a lighthouse beside it."""

    def __init__(self, launch: Launch, command: list[str], deadlines: Deadlines, max_quick_deaths: int) -> None:
        """`command` is started without a change."""
        super().__init__(launch, deadlines, max_quick_deaths, keeps_lighthouse=launch.local_rank == 0)
        self._command = command
        self._done = False

    def start_process(self, start: SeatStart) -> Child:
        """See the base."""
        child = self._supervisor.start(SEAT, self._command, fd_variable=SUPERVISOR_FD)
        child.send(start)
        return child

    def on_message(self, event: Event) -> None:
        """See the base."""
        self._done = self._done or isinstance(event.message, Done)

    def is_loss(self) -> bool:
        """See the base."""
        return not self._done

    def on_exit(self, code: int) -> int | None:
        """See the base; 128 + N for a script that signal N killed, as in a shell."""
        if self._done and code < 0:
            return 0
        if code == 0 or self._done or self._view is None:
            return code if code >= 0 else 128 - code
        return None


def main() -> int:
    """Run the script until it ends well; returns the exit code of this rank."""
    parser = argparse.ArgumentParser(
        prog="python -m elastic_moe.supervise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = ElasticConfig()
    parser.add_argument(
        "--hang-timeout", type=float, default=defaults.hang_timeout_s, help="kill a stopped script after SECONDS"
    )
    parser.add_argument(
        "--max-quick-deaths", type=int, default=defaults.max_quick_deaths, help="deaths within a minute of the start"
    )
    parser.add_argument("script", help="Python script to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args()
    if not Path(options.script).is_file():
        parser.error(f"no such script: {options.script}")
    try:
        launch = Launch.from_torchrun(os.environ)
        deadlines = ElasticConfig(hang_timeout_s=options.hang_timeout).deadlines(launch.world_size)
    except ValueError as error:
        parser.error(str(error))
    os.environ.setdefault("RUST_LOG", "error")  # torchft tells of every heartbeat
    command = [sys.executable, options.script, *options.args]
    return ScriptSupervisor(launch, command, deadlines, options.max_quick_deaths).run()


if __name__ == "__main__":
    sys.exit(main())
