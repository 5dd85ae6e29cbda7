"""`make demo`: four ranks on this machine, two completions side by side, and where the experts live.

Starts `torchrun --nproc-per-node 4 launch/serve.py model=demo` and talks to it as any OpenAI client would. Then it
streams the same again, kills a rank meanwhile, waits for the rank's return, and fails if a single character differs.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path

from openai import AsyncOpenAI
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.server import START_TIMEOUT_S, OwnServer

PROMPTS = ["In the beginning God created", "To install a package on a Debian system,"]


def main() -> int:
    """Start, stream, kill, compare, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--no-kill", action="store_true", help="stream once, and kill nobody")
    args = parser.parse_args()
    console = Console()
    console.print(f"[bold]starting[/]: torchrun --nproc-per-node {args.ranks} launch/serve.py model=demo")
    begin = time.monotonic()
    with OwnServer(args.ranks, 1, ["model=demo", "server.port=0", "log_level=warning"]) as server:
        try:
            console.print(f"serving at [link]{server.url}[/] after {time.monotonic() - begin:.1f} s")
            same = show(server.url, args, console)
            clean = server.stop()
        except BaseException:
            console.print(server.nodes[0].log(), markup=False, highlight=False)
            raise
    console.print("stopped cleanly" if clean else f"[bold red]it had to be killed[/]: see {server.folder}")
    if clean:
        server.forget_output()
    return 0 if same and clean else 1


def show(url: str, args: argparse.Namespace, console: Console) -> bool:
    """The two runs and what became of the killed rank. Returns whether the texts are equal."""
    texts, tokens, seconds = asyncio.run(stream_side_by_side(url, args.tokens, console))
    rate = f"[bold]{tokens / seconds:.0f} tokens/s[/]"
    console.print(f"{tokens} tokens in {seconds:.2f} s: {rate} over {len(PROMPTS)} streams")
    console.print(experts_table(get_json(f"{url}/elastic/status")))
    if args.no_kill or args.ranks == 1:
        return True
    victim = get_json(f"{url}/elastic/status")["members"][1]
    console.print(f"the same again, and in the middle of it: [bold red]kill -9[/] of rank {victim['rank']}")
    again, _, _ = asyncio.run(stream_side_by_side(url, args.tokens, console, victim["pid"]))
    ended = time.monotonic()
    events = get_json(f"{url}/elastic/events")
    reports = [event["report"] for event in events if event["report"]["type"] == "recovery"]
    report = next((r for r in reports if victim["rank"] in r["lost"]), None)
    if report is None:
        console.print("[bold red]the rank was not lost: the demo proves nothing[/]")
        return False
    timeline = ", ".join(f"{phase} {1000 * seconds:.0f} ms" for phase, seconds in report["phase_s"].items())
    console.print(f"epoch {report['epoch']} without rank {victim['rank']}: {timeline}; then the step was repeated")
    wait_until_whole(url, args.ranks)
    console.print(f"rank {victim['rank']} is back {time.monotonic() - ended:.1f} s after the streams ended")
    console.print(experts_table(get_json(f"{url}/elastic/status")))
    same = again == texts
    console.print("[bold green]both texts are as before[/]" if same else "[bold red]the texts differ[/]")
    return same


def wait_until_whole(url: str, ranks: int) -> None:
    """Wait until all ranks serve again; RuntimeError when they do not."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while [m["phase"] for m in get_json(f"{url}/elastic/status")["members"]] != ["serving"] * ranks:
        if time.monotonic() > deadline:
            raise RuntimeError("the killed rank did not come back")
        time.sleep(0.2)


def get_json(url: str) -> dict:
    """GET a JSON document."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


async def stream_side_by_side(
    url: str, max_tokens: int, console: Console, victim: int | None = None
) -> tuple[list[str], int, float]:
    """Stream all prompts at once, and kill the process `victim` in the middle; returns (texts, tokens, seconds)."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    texts = list(PROMPTS)
    counts = [0] * len(PROMPTS)
    chunks = 0

    def render() -> Columns:
        width = console.width // 2 - 1
        return Columns(Panel(text, title=f"stream {i}", width=width, height=14) for i, text in enumerate(texts))

    async def stream(i: int, live: Live) -> None:
        nonlocal chunks
        async for chunk in await client.completions.create(
            model="demo",
            prompt=PROMPTS[i],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            if chunk.choices:
                texts[i] += chunk.choices[0].text
            if chunk.usage:
                counts[i] = chunk.usage.completion_tokens
            chunks += 1
            if victim is not None and chunks == max_tokens:  # half of what both streams get
                os.kill(victim, signal.SIGKILL)
            live.update(render())

    begin = time.monotonic()
    with Live(render(), console=console, refresh_per_second=8) as live:
        await asyncio.gather(*(stream(i, live) for i in range(len(PROMPTS))))
    seconds = time.monotonic() - begin
    console.print()
    await client.close()
    return texts, sum(counts), seconds


def experts_table(status: dict) -> Table:
    """Where the experts of the first MoE layer live."""
    table = Table(
        title=f"experts of layer 0, placement version {status['placement']['version']} ({status['placement']['hash']})"
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
