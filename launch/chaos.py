"""Break a server on purpose while it streams, and compare every token with an undisturbed run.

    python launch/chaos.py chaos.seed=7 chaos.faults=3 chaos.kinds=kill,kill_two
    python launch/chaos.py chaos.url=http://127.0.0.1:8000
    python launch/chaos.py chaos.nodes=2 chaos.kinds=kill,corrupt,kill_node elastic.redundant_slots=1

Kinds: kill, kill_two, kill_in_recovery (SIGKILL of an engine, of two at once, of a second while the first loss is
mended), stop (SIGSTOP), term (SIGTERM), corrupt (all experts on the last node's disk have wrong bits while an engine is
killed: they have to be refused, and read on the other node), fork (an instance of one rank less
is started whose weights come from this server, an engine of which is killed while it loads; it has to give the same
answers; not with chaos.url), kill_node (all processes of the last node; it cannot come back, so it is the last fault,
and healed means that the others serve), calm (nothing is done: what the same server and this client show by themselves,
to compare with).

Its last line of output is one JSON object; progress goes to standard error. Exit code 1: something was lost, changed
or repeated, a fault did not come, a rank did not return, or a fork was wrong. 2: it could not start.
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx

from launch.command import run_command
from launch.faults.config import ChaosRunConfig
from launch.faults.driver import run
from launch.server import ServerFailed

USAGE = "usage: python launch/chaos.py [chaos.KEY=VALUE ...] [what launch/serve.py takes ...]"


def main() -> int:
    """The exit code."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    return run_command(ChaosRunConfig, "chaos", USAGE, run, expected=(ServerFailed, httpx.HTTPError))


if __name__ == "__main__":
    sys.exit(main())
