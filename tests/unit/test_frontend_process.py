"""The front end as its supervisor sees it: ready, refused, stopped."""

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from support.front_end import FakeEngine, make_config

from elastic_moe.config import ServeConfig
from elastic_moe.group.view import View
from elastic_moe.serving.front_end.listener import listen
from elastic_moe.serving.front_end.process import main, serve
from elastic_moe.serving.front_end.served_model import ServedModel
from elastic_moe.serving.starts import FrontEndStart
from elastic_moe.supervision.channel import Channel, Ready, Refused, ViewChanged, channel_pair
from launch.config import REPO
from launch.sse import events


def run_until_refused(config: ServeConfig) -> str:
    """The reason the front end gives, in this process, for not starting."""
    supervisor, theirs = channel_pair()
    supervisor.send(FrontEndStart(config, node=0))
    listener = listen(config.server)
    assert main(["--supervisor-fd", str(theirs.detach()), "--listen-fd", str(listener.detach())]) == 2
    refused = supervisor.receive()
    supervisor.close()
    assert isinstance(refused, Refused)
    return refused.reason


def test_a_taken_port_is_refused(checkpoint: Path):
    config = make_config(checkpoint)
    with listen(config.server) as taken:
        config.server.port = taken.getsockname()[1]
        expected = (
            f"server.port={config.server.port} is taken on 127.0.0.1; "
            "choose another with server.port=PORT (0: any free one)"
        )
        with pytest.raises(ValueError, match=re.escape(expected)):
            listen(config.server)


def test_an_address_of_another_host_is_refused(checkpoint: Path):
    config = make_config(checkpoint)
    config.server.host = "192.0.2.1"
    with pytest.raises(ValueError, match=re.escape("server.host=192.0.2.1 server.port=0: cannot listen there")):
        listen(config.server)


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert f"model.path='{tmp_path}'" in run_until_refused(make_config(tmp_path))


def test_it_ends_with_its_supervisor(checkpoint: Path):
    config = make_config(checkpoint)
    supervisor, theirs = channel_pair()
    channel = Channel.of_child(theirs.detach(), FrontEndStart | ViewChanged)
    supervisor.close()
    with contextlib.closing(ServedModel.load(config)) as model:
        asyncio.run(asyncio.wait_for(serve(FrontEndStart(config, node=0), listen(config.server), model, channel), 20))


def test_the_process(checkpoint: Path):
    """Started, given a view, asked, and stopped by a signal in the middle of a stream."""
    supervisor, theirs = channel_pair()
    listener = listen(make_config(checkpoint).server)
    fds = [theirs.fileno(), listener.fileno()]
    command = [sys.executable, "-m", "elastic_moe.serving.front_end.process"]
    command += ["--supervisor-fd", str(fds[0]), "--listen-fd", str(fds[1])]
    process = subprocess.Popen(command, pass_fds=fds, cwd=REPO)
    theirs.close()
    listener.close()
    try:
        supervisor.send(FrontEndStart(make_config(checkpoint), node=0))
        ready = supervisor.receive()
        assert isinstance(ready, Ready)
        asyncio.run(asyncio.wait_for(use_and_stop(process, supervisor, ready.detail), 30))
    finally:
        process.kill()
        process.wait()
        supervisor.close()


async def use_and_stop(process: subprocess.Popen, supervisor: Channel, url: str) -> None:
    engine = FakeEngine(0, [5, 6, 7, 0])
    body = {"model": "tiny", "prompt": "the"}
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:
        assert (await client.get("/health")).status_code == 503
        supervisor.send(ViewChanged(View(1, (engine.member,))))
        answer = await client.post("/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 4
        assert (await client.get("/health")).status_code == 200
        engine.sends = 1
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            pieces = events(response)
            assert "text_completion" in await anext(pieces)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest = [piece async for piece in pieces]
        assert time.monotonic() - began < 2
        assert "the server is stopping" in rest[0]
        assert await asyncio.to_thread(process.wait, 20) == 0
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")
    engine.close()
