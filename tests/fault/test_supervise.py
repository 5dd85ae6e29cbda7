"""`python -m elastic_moe.supervise`: a script of the library's user survives the death of a rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.config import REPO


def run_script(folder: Path, *arguments: str, script: str = "examples/score.py") -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [*torchrun, "-m", "elastic_moe.supervise", script, "--out", str(folder), *arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=150, check=False)


def scores(folder: Path) -> list[dict]:
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda score: score["document"])


@pytest.mark.timeout(170)
def test_the_example_survives_a_kill(tmp_path: Path):
    calm = run_script(tmp_path / "calm", "--documents", "12")
    assert calm.returncode == 0, calm.stderr
    stormy = run_script(tmp_path / "stormy", "--documents", "12", "--kill", "1")
    assert stormy.returncode == 0, stormy.stderr
    assert [s["document"] for s in scores(tmp_path / "stormy")] == list(range(12))
    for one, other in zip(scores(tmp_path / "calm"), scores(tmp_path / "stormy"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
    assert "rank 1: the process died with code -9; respawn" in stormy.stderr
    for line in ("rank 0: lost rank 1", "rank 2: lost rank 1", "rank 0: rank 1 joined", "rank 2: rank 1 joined"):
        assert line in stormy.stdout
    assert stormy.stdout.splitlines()[-1] == calm.stdout.splitlines()[-1]


def test_a_script_that_never_joins_ends_the_launch_with_its_code(tmp_path: Path):
    script = tmp_path / "bad.py"
    script.write_text("import sys; sys.exit(3)")
    ended = run_script(tmp_path, script=str(script))
    assert ended.returncode == 1
    assert "exitcode  : 3" in ended.stderr


def test_a_missing_script_is_named(tmp_path: Path):
    command = [sys.executable, "-m", "elastic_moe.supervise", str(tmp_path / "none.py")]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 2
    assert "no such script" in ended.stderr
