"""What is refused at the start, in one line, and how everything ends, whoever is killed."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.server import DEMO_MODEL, Ended, Server, run_to_end, wait_until
from transformers import LlamaConfig, LlamaForCausalLM

from launch.config import REPO
from launch.server import torchrun

ALONE = [sys.executable]
"""Without torchrun: one rank."""
GONE_WITHIN_S = 15.0
"""All ranks, after one has told of a user's mistake: 1 to 2 s alone on two cores, 8 s were seen beside another server
that loads there. Who waits for a deadline takes 30 s and more."""
ALSO_BY_UNIT_TESTS = ("truncated", "no experts", "float8")
"""Mistakes whose line has a test without a server; their way to the end is that of the others."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that cannot be served."""
    root = tmp_path_factory.mktemp("checkpoints")
    (root / "empty").mkdir()
    for name in ("truncated", "no_weights", "dense", "bad_tokenizer", "no_tokenizer", "float8"):
        shutil.copytree(DEMO_MODEL, root / name)
    (root / "bad_tokenizer" / "tokenizer.json").write_text("{")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "no_tokenizer" / name).unlink()
    weights = load_file(root / "float8" / "model.safetensors")
    for name in [name for name in weights if ".experts." in name]:
        weights[f"{name}_scale_inv"] = torch.ones(1, 1)
        weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, root / "float8" / "model.safetensors", {"format": "pt"})
    os.truncate(root / "truncated" / "model.safetensors", 1_000_000)
    (root / "no_weights" / "model.safetensors").unlink()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).save_pretrained(root / "dense")
    return root


def refused(ended: Ended) -> str:
    """The one line of a refusal, which is all there is on standard error."""
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    return line.removeprefix("elastic_moe: ")


FOUND_BY_THE_SUPERVISOR = {
    "unknown key": (["serving.max_request=4"], "unknown key 'serving.max_request'; did you mean serving.max_requests"),
    "not a key": (["demo"], "'demo' is not KEY=VALUE; --help lists the keys"),
    "unknown option": (["model=gpt"], "model=gpt: no such model; choose one of deepseek_v3, demo, hf, qwen3_moe"),
    "wrong type": (["serving.max_requests=many"], "serving.max_requests: Value 'many' of type 'str'"),
    "wrong value": (["model.dtype=int3"], "model.dtype='int3': must be one of float32, bfloat16, float16, auto"),
    "too short": (["serving.max_model_len=1"], "serving.max_model_len=1: must be null, or 2 or more"),
    "no path": (["model=hf"], "model.path='': must name a folder with a safetensors checkpoint"),
    "no folder": (["model.path={}/missing"], "no such folder; give a local checkpoint folder"),
    "no config.json": (["model.path={}/empty"], "empty': holds no config.json"),
    "no weights": (["model.path={}/no_weights"], "holds neither model.safetensors nor model.safetensors.index.json"),
}
FOUND_BY_THE_ENGINE = {
    "truncated": (["model.path={}/truncated"], "cannot read {}/truncated/model.safetensors: "),
    "no experts": (["model.path={}/dense"], "LlamaForCausalLM has no experts module"),
    "float8": (["model.path={}/float8"], ".weight_scale_inv in {}/float8/model.safetensors: the weights are quantised"),
    "bad tokenizer": (["model.path={}/bad_tokenizer"], "bad_tokenizer': its config or tokenizer cannot be read: "),
    "no tokenizer": (
        ["model.path={}/no_tokenizer"],
        "no_tokenizer': it has no tokenizer files, such as tokenizer.json",
    ),
    "no gpu": (["model.device=cuda"], "model.device=cuda: 1 local ranks but 0 GPUs"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if case in ALSO_BY_UNIT_TESTS else [])
        for case in (*FOUND_BY_THE_SUPERVISOR, *FOUND_BY_THE_ENGINE)
    ],
)
def test_one_rank_refuses(case: str, folders: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    overrides, reason = (FOUND_BY_THE_SUPERVISOR | FOUND_BY_THE_ENGINE)[case]
    overrides = [override.format(folders) for override in overrides]
    ended = run_to_end(ALONE, "server.port=0", "log_level=warning", *overrides)
    assert reason.format(folders) in refused(ended)
    assert ended.seconds_after_complaint < GONE_WITHIN_S


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("elastic.slot_per_rank=2", "unknown key 'elastic.slot_per_rank'; did you mean elastic.slots_per_rank"),
        ("elastic.slots_per_rank=2", "4 ranks x 2 slots hold 8 of 16 experts: 4 slots per rank or more are needed"),
    ],
)
def test_four_ranks_refuse_once(override: str, reason: str):
    ended = run_to_end(torchrun(4), "server.port=0", "log_level=warning", override)
    (line,) = ended.complaints
    assert reason in line
    assert ended.code == 1  # torchrun's own, which reports the supervisor's:
    assert "exitcode  : 2" in ended.err
    assert ended.seconds_after_complaint < GONE_WITHIN_S


def test_a_master_port_of_zero_is_refused():
    ended = run_to_end(torchrun(2, "--master-port", "0"))
    assert ended.complaints == [
        "elastic_moe: torchrun --master-port 0 tells its ranks no port: give one, or --standalone on one node"
    ]


def test_a_taken_port_is_refused():
    with Server(ALONE, "log_level=warning") as server:
        port = int(server.url.rsplit(":", 1)[1])
        ended = run_to_end(ALONE, f"server.port={port}")
        assert refused(ended).startswith(f"server.port={port} is taken on 127.0.0.1; choose another")
        server.stop(signal.SIGTERM)
        assert server.process.returncode == 0
        assert server.err == ""


def test_help_lists_groups_and_keys():
    ended = run_to_end(ALONE, "--help")
    assert (ended.code, ended.err) == (0, "")
    for option in (REPO / "conf" / "model").glob("*.yaml"):
        assert option.stem in ended.out
    for key in ("model.path", "elastic.redundant_slots", "serving.max_model_len", "server.port", "log_level"):
        (line,) = [line for line in ended.out.splitlines() if line.strip().startswith(f"{key}=")]
        assert len(line.split(maxsplit=1)) == 2, f"{key} has no meaning"


def test_a_killed_supervisor_leaves_no_orphan():
    with Server(torchrun(2), "log_level=warning") as server:
        engine = server.engines()[1]
        supervisor = engine.parent()
        assert supervisor is not None
        assert "launch/serve.py" in supervisor.cmdline()
        supervisor.kill()
        wait_until(lambda: not engine.is_running(), 2.0, "the engine of a killed supervisor ends")
        server.wait(10.0)
        server.assert_nothing_left()


@pytest.mark.slow
def test_a_killed_torchrun_leaves_nothing_and_its_port_is_free():
    with Server(torchrun(2), "log_level=warning") as server:
        port = int(server.url.rsplit(":", 1)[1])
        server.process.kill()
        server.process.wait()
        server.assert_nothing_left(within_s=8.0)
        with Server(ALONE, f"server.port={port}", "log_level=warning") as again:
            assert again.url.endswith(f":{port}")
            again.stop()


def test_a_signal_while_loading_ends_everything():
    with Server(torchrun(2), "log_level=warning") as server:
        wait_until(lambda: len(server.processes()) >= 1 + 2 * 2 + 1, 30.0, "torchrun, 2 supervisors, 3 children")
        server.stop(signal.SIGTERM)
