"""`make demo`: four ranks on this machine, two completions side by side, and where the experts live.

Starts `torchrun --nproc-per-node 4 launch/serve.py model=demo`, talks to it as any OpenAI client would, and stops it.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from openai import AsyncOpenAI
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

REPO = Path(__file__).resolve().parent.parent
PROMPTS = ["In the beginning God created", "To install a package on a Debian system,"]
START_TIMEOUT_S = 120


def main() -> int:
    """Start, show, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    console = Console()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    command = [*torchrun, "launch/serve.py", "model=demo", "server.port=0", "log_level=warning"]
    console.print(
        f"[bold]starting {args.ranks} ranks[/]: torchrun --nproc-per-node {args.ranks} launch/serve.py model=demo"
    )
    begin = time.monotonic()
    server = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    try:
        url = wait_until_ready(server)
        console.print(f"serving at [link]{url}[/] after {time.monotonic() - begin:.1f} s")
        tokens, seconds = asyncio.run(stream_side_by_side(url, args.tokens, console))
        console.print(
            f"{tokens} tokens in {seconds:.2f} s: [bold]{tokens / seconds:.0f} tokens/s[/] over {len(PROMPTS)} streams"
        )
        console.print(experts_table(get_json(f"{url}/elastic/status")))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
    console.print("stopped cleanly")
    return 0


def wait_until_ready(server: subprocess.Popen[str]) -> str:
    """The server's URL once /health answers 200; RuntimeError when it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    url = read_url(server.stdout)
    while server.poll() is None and time.monotonic() < deadline:
        try:
            get_json(f"{url}/health")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
        else:
            return url
    raise RuntimeError(f"the server did not come up within {START_TIMEOUT_S} s (exit code {server.poll()})")


def read_url(output: IO[str] | None) -> str:
    """The address in the line that the server prints."""
    for line in output or ():
        if " at http" in line:
            return line.rsplit(" at ", 1)[1].strip()
        sys.stdout.write(line)
    raise RuntimeError("the server ended before it served")


def get_json(url: str) -> dict:
    """GET a JSON document."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


async def stream_side_by_side(url: str, max_tokens: int, console: Console) -> tuple[int, float]:
    """Stream all prompts at once; returns (tokens, seconds)."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    texts = list(PROMPTS)
    counts = [0] * len(PROMPTS)

    def render() -> Columns:
        panels = (
            Panel(text, title=f"stream {i}", width=console.width // 2 - 1, height=14) for i, text in enumerate(texts)
        )
        return Columns(panels)

    async def stream(i: int, live: Live) -> None:
        chunks = await client.completions.create(
            model="demo",
            prompt=PROMPTS[i],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in chunks:
            if chunk.choices:
                texts[i] += chunk.choices[0].text
            if chunk.usage:
                counts[i] = chunk.usage.completion_tokens
            live.update(render())

    begin = time.monotonic()
    with Live(render(), console=console, refresh_per_second=8) as live:
        await asyncio.gather(*(stream(i, live) for i in range(len(PROMPTS))))
    return sum(counts), time.monotonic() - begin


def experts_table(status: dict) -> Table:
    """Where the experts of the first MoE layer live."""
    table = Table(
        title=f"experts of layer 0, placement version {status['placement_version']} ({status['placement_hash']})"
    )
    for column in ("rank", "node", "pid", "slots", "memory"):
        table.add_column(column)
    for member in status["members"]:
        slots = " ".join("-" if e < 0 else str(e) for e in member["slots"][0])
        memory = f"{member['memory_bytes'] / 2**20:.0f} MiB"
        table.add_row(str(member["rank"]), str(member["node"]), str(member["pid"]), slots, memory)
    return table


if __name__ == "__main__":
    sys.exit(main())
