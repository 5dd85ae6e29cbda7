"""Serve a Mixture-of-Experts model with its experts spread over torchrun's ranks.

    torchrun --nproc-per-node 4 launch/serve.py model=demo
    torchrun --nnodes 2 --nproc-per-node 8 ... launch/serve.py model=qwen3_moe model.path=/models/Qwen3-235B-A22B

Each process that torchrun starts is a supervisor: it loads no torch and starts the engine of its rank and, on the
first rank of a node, the HTTP front end and a lighthouse.
"""

import os
import sys
from pathlib import Path

from msgspec.structs import replace

REPO = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, REPO)

from elastic_moe.config import ServeConfig
from elastic_moe.membership.launch import Launch
from elastic_moe.secret import attempt_folder, read_secret
from elastic_moe.serving.front_end.listener import listen
from elastic_moe.serving.supervisor import ServeSupervisor
from elastic_moe.supervision.supervisor import complain
from elastic_moe.wire import Wire
from launch.config import help_text, load

USAGE = "usage: torchrun [--nnodes N] --nproc-per-node RANKS launch/serve.py [GROUP=OPTION ...] [KEY=VALUE ...]"


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
        if secret_file := config.elastic.secret_file:
            launch = replace(launch, wire=Wire(read_secret(secret_file, "elastic.secret_file")))
        listener = listen(config.server) if launch.local_rank == 0 else None
    except ValueError as error:
        complain(str(error), attempt)
        return 2
    return ServeSupervisor(config, launch, listener, attempt).run()


if __name__ == "__main__":
    sys.exit(main())
