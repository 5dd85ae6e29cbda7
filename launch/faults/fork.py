"""The kind `fork`: another instance takes its weights from the server under test, which loses a rank meanwhile."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from launch.faults.verdict import Verdict, compare
from launch.server import POLL_S, START_TIMEOUT_S, OwnServer, ServerFailed, Target
from launch.streams import PROMPTS, Answer, Load, greedy_asks

SECTIONS = ("model", "exchange", "serving")
"""What a fork is told as the server was; the rest, such as its number of slots, are defaults."""
MET, LOADED = " met; the group is ", " loaded "
"""What an engine says before it loads, and after."""
NUM_PROMPTS, NUM_TOKENS = 4, 32


class Fork:
    """Another instance. Nothing is started before `begin`; whoever made it has to close it."""

    def __init__(self, ranks: int, overrides: Sequence[str], serve_within_s: float, seed: Target) -> None:
        """Args:
        ranks: its own.
        overrides: see `fork_overrides`.
        serve_within_s: how long it may take from its start until all its ranks serve.
        seed: the server that it is made from.
        """
        self.fault = ""
        """What is wrong with it; empty: nothing, so far."""
        self.is_starting = True
        """Until it serves, or does not."""
        self.was_loading = False
        """Whether it had begun to load when `begin` returned, and was not done."""
        self._ranks = ranks
        self._overrides = [*overrides, f"model.load_from={seed.url}"]
        self._serve_within_s = serve_within_s
        self._seed = seed
        self._server: OwnServer | None = None
        self._url = ""
        self._deadline = 0.0

    async def begin(self, delay_s: float) -> None:
        """Start it; returns `delay_s` after the first of its engines has begun to load, or when none does."""
        self._server = OwnServer(self._ranks, 1, self._overrides)
        self._deadline = time.monotonic() + self._serve_within_s
        while not self._num_said(MET) and not self._server.nodes[0].ends(0) and time.monotonic() < self._deadline:
            await asyncio.sleep(POLL_S / 4)
        await asyncio.sleep(delay_s)
        self.was_loading = self._num_said(MET) > 0 and self._num_said(LOADED) < self._ranks

    async def finish(self) -> None:
        """Wait until all its ranks serve; or else `fault` says why not."""
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                if self._server is not None:
                    self._url = await asyncio.to_thread(self._server.nodes[0].wait_for_url, self._serve_within_s)
                async with Target(self._url) as fork:
                    await fork.until_all_serve(self._ranks)
        except (ServerFailed, httpx.HTTPError, TimeoutError) as error:
            self.fault = f"the fork does not serve: {error or type(error).__name__}"
        self.is_starting = False

    async def compare(self) -> None:
        """Ask it and its seed the same; `fault` says what it answers otherwise."""
        if self.fault:
            return
        try:
            asks, model = greedy_asks(PROMPTS, NUM_PROMPTS, NUM_TOKENS), await self._seed.model()
        except httpx.HTTPError as error:
            self.fault = f"the fork's seed does not answer: {error or type(error).__name__}"
            return
        seed, fork = Load(self._seed.url, model, asks), Load(self._url, model, asks)
        await asyncio.gather(seed.run(), fork.run())
        self.fault = fork_fault(seed.answers, fork.answers)

    def close(self) -> None:
        """End it. What it said is kept if something was wrong."""
        if self._server is not None:
            self._server.stop()
            if not self.fault:
                self._server.forget_output()

    def _num_said(self, what: str) -> int:
        return self._server.nodes[0].err.count(what) if self._server is not None else 0


def fork_overrides(told: Sequence[str], folder: Path) -> list[str]:
    """What a fork is told, beside where its weights come from.

    Args:
        told: what the server was told.
        folder: that of the model, without weights.
    """
    same = [one for one in told if one.partition("=")[0].partition(".")[0] in SECTIONS]
    return [*same, f"model.path={folder}", "server.port=0", "log_level=info"]


def fork_within_s(rejoin_timeout_s: float) -> float:
    """How long a fork may take, from its start until all its ranks serve."""
    return START_TIMEOUT_S + rejoin_timeout_s


def fork_fault(wanted: Sequence[Answer], answers: Sequence[Answer]) -> str:
    """What is wrong with a fork's answers, if its seed gives those that are wanted; empty: nothing."""
    for want, got in zip(wanted, answers, strict=True):
        if (verdict := compare(want, got)) is not Verdict.SAME:
            return f"the fork's answer is {verdict.value}: {got.error} wanted {want.text!r}, got {got.text!r}"
    return ""
