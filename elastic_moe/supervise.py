"""`torchrun ... -m elastic_moe.supervise SCRIPT [ARGS ...]`: run any script under a supervisor of its rank.

torchrun stops all its processes when one of them dies, so the process it starts must not be the one that may die.
This one starts SCRIPT as its child with the same environment, passes signals on, and ends when the child ends.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

STOP_GRACE_S = 4.0


def main() -> int:
    """Run the script; its exit code is this process's (128 + N when signal N killed it)."""
    parser = argparse.ArgumentParser(prog="python -m elastic_moe.supervise", description=__doc__)
    parser.add_argument("script", help="Python script to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args()
    if not Path(options.script).is_file():
        parser.error(f"no such script: {options.script}")
    child = subprocess.Popen([sys.executable, options.script, *options.args], env=os.environ)  # noqa: S603
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: child.send_signal(got))
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
