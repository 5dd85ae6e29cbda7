"""Serve a Mixture-of-Experts model with its experts spread over torchrun's ranks.

    torchrun --nproc-per-node 4 launch/serve.py model=demo
    torchrun --nnodes 2 --nproc-per-node 8 ... launch/serve.py model=qwen3_moe model.path=/models/Qwen3-235B-A22B

Each process that torchrun starts is a supervisor: it loads no torch and starts the engine of its rank and, on the
first rank of a node, the HTTP front end.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

REPO = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, REPO)

from elastic_moe.config import ServeConfig
from elastic_moe.membership.channel import EngineStart, FrontEndStart, Ready, Refused, ViewChanged
from elastic_moe.membership.launch import Launch
from elastic_moe.membership.supervisor import Supervisor, complain, exit_code
from elastic_moe.serving.listener import listen
from launch.config import help_text, load

USAGE = "usage: torchrun [--nnodes N] --nproc-per-node RANKS launch/serve.py [GROUP=OPTION ...] [KEY=VALUE ...]"


def serve(config: ServeConfig, launch: Launch, attempt: Path | None) -> int:
    """Run this rank's children until one ends or a signal comes; `attempt` as from `attempt_folder`.

    Returns the exit code.
    """
    supervisor = Supervisor()
    front_end = None
    if launch.local_rank == 0:
        with listen(config.server) as listener:
            command = [sys.executable, "-m", "elastic_moe.serving.frontend", "--listen-fd", str(listener.fileno())]
            front_end = supervisor.start("front end", command, pass_fds=[listener.fileno()])
        front_end.channel.send(FrontEndStart(config, launch.node))
    engine = supervisor.start("engine", [sys.executable, "-m", "elastic_moe.serving.engine"])
    engine.channel.send(EngineStart(config, launch))
    refusal = None
    while True:
        event = supervisor.next_event()
        match event.message:
            case ViewChanged() as changed if front_end:
                front_end.channel.send(changed)
            case Ready(detail=url) if event.child == "front end":
                print(f"elastic_moe: node {launch.node} serves {config.model.name} at {url}", flush=True)
            case Refused() as refusal:
                pass
        if event.code is not None:
            break
    supervisor.stop()
    if refusal is not None:
        complain(refusal.reason, attempt)
    elif event.child:
        complain(f"rank {launch.rank}: the {event.child} ended with code {event.code}", None)
    return exit_code(event, refusal)


def attempt_folder(environ: Mapping[str, str]) -> Path | None:
    """What this node's processes of this start share: torchrun's folder for error files. None without torchrun."""
    error_file = environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent if error_file else None


def main() -> int:
    """Parse, validate, serve."""
    overrides = sys.argv[1:]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [REPO, os.environ.get("PYTHONPATH")]))  # for the children
    attempt = attempt_folder(os.environ)
    try:
        launch = Launch.from_torchrun(os.environ)
        if "--help" in overrides or "-h" in overrides:
            if launch.rank == 0:
                print(help_text(ServeConfig, USAGE))
            return 0
        return serve(load(ServeConfig, "config", overrides), launch, attempt)
    except ValueError as error:
        complain(str(error), attempt)
        return 2


if __name__ == "__main__":
    sys.exit(main())
