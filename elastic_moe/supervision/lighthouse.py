"""The embedded lighthouse of a node: torchft's, in a process of its own, started by the node's first supervisor."""

import argparse
import threading

from torchft.coordination import LighthouseServer

from elastic_moe.background import end_process, start_thread
from elastic_moe.supervision.channel import Channel, Ready

TICK_MS = 10
"""How often it looks whether all have asked: what a view may take longer than its slowest member."""


def main() -> None:
    """Entry of `python -m elastic_moe.supervision.lighthouse --bind HOST:PORT ... --supervisor-fd N`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bind", required=True)
    parser.add_argument("--join-timeout-ms", type=int, required=True, help="Deadlines.lighthouse_wait_s")
    parser.add_argument("--heartbeat-timeout-ms", type=int, required=True, help="Deadlines.heartbeat_timeout_s")
    parser.add_argument("--supervisor-fd", type=int, required=True)
    arguments = parser.parse_args()
    channel = Channel.of_child(arguments.supervisor_fd, None)
    server = LighthouseServer(
        bind=arguments.bind,
        min_replicas=1,
        join_timeout_ms=arguments.join_timeout_ms,
        quorum_tick_ms=TICK_MS,
        heartbeat_timeout_ms=arguments.heartbeat_timeout_ms,
    )
    channel.send(Ready(f"http://{arguments.bind}"))
    supervisor_died = threading.Event()
    start_thread("supervisor", _wait_for_death, channel, supervisor_died, on_error=end_process)
    supervisor_died.wait()
    server.shutdown()


def _wait_for_death(channel: Channel, supervisor_died: threading.Event) -> None:
    while channel.receive() is not None:
        pass
    supervisor_died.set()


if __name__ == "__main__":
    main()
