"""Serve a Mixture-of-Experts model with its experts spread over torchrun's ranks.

    torchrun --nproc-per-node 4 launch/serve.py model=demo
    torchrun --nnodes 2 --nproc-per-node 8 ... launch/serve.py model=qwen3_moe model.path=/models/Qwen3-235B-A22B

Each process that torchrun starts is a supervisor: it loads no torch and starts the engine of its rank and, on the
first rank of a node, the HTTP front end and a lighthouse.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

REPO = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, REPO)

from elastic_moe.config import ServeConfig
from elastic_moe.membership.launch import Launch
from elastic_moe.serving.front_end.listener import listen
from elastic_moe.serving.supervisor import ServeSupervisor
from elastic_moe.supervision.supervisor import complain
from launch.config import help_text, load

USAGE = "usage: torchrun [--nnodes N] --nproc-per-node RANKS launch/serve.py [GROUP=OPTION ...] [KEY=VALUE ...]"


def attempt_folder(environ: Mapping[str, str]) -> Path | None:
    """What this node's processes of this start share: torchrun's folder for error files. None without torchrun."""
    error_file = environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent if error_file else None


def main() -> int:
    """Parse, validate, serve."""
    overrides = sys.argv[1:]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [REPO, os.environ.get("PYTHONPATH")]))  # for the children
    os.environ.setdefault("RUST_LOG", "error")  # torchft tells of every heartbeat
    attempt = attempt_folder(os.environ)
    try:
        launch = Launch.from_torchrun(os.environ)
        if "--help" in overrides or "-h" in overrides:
            if launch.rank == 0:
                print(help_text(ServeConfig, USAGE))
            return 0
        config = load(ServeConfig, "config", overrides)
        listener = listen(config.server) if launch.local_rank == 0 else None
    except ValueError as error:
        complain(str(error), attempt)
        return 2
    return ServeSupervisor(config, launch, listener, attempt).run()


if __name__ == "__main__":
    sys.exit(main())
