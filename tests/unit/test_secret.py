"""Where the secret of a launch comes from, and what is refused."""

import os
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic_moe.membership.launch import Launch, SeatStart
from elastic_moe.membership.rendezvous import Seat, meet
from elastic_moe.secret import launch_secret, read_secret
from elastic_moe.wire import Wire


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """As torchrun's on a lone node."""
    return {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_ERROR_FILE": str(tmp_path / "attempt_0" / "1" / "error.json"),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "attempt_0"
    folder.mkdir()
    return folder


def test_the_processes_of_a_node_make_one_secret_that_nobody_else_reads(environ, folder):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(launch_secret(environ))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(found[0]) == 64
    file = folder.parent / "elastic_moe_secret"
    assert set(folder.parent.iterdir()) == {file, folder}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Launch.from_torchrun(environ).wire.secret == found[0]


def test_the_next_start_of_a_launch_reads_what_the_last_one_wrote_into_the_store(environ, folder, tmp_path):
    (tmp_path / "attempt_1").mkdir()
    later = environ | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "attempt_1" / "1" / "error.json")}
    assert launch_secret(environ) == launch_secret(later)


def test_a_file_that_others_can_read_is_refused(environ, folder):
    (folder.parent / "elastic_moe_secret").write_text("planted by somebody else")
    os.chmod(folder.parent / "elastic_moe_secret", 0o644)
    with pytest.raises(ValueError, match="readable by nobody else"):
        launch_secret(environ)


def test_several_nodes_have_one_only_if_they_are_told(environ, folder):
    several = environ | {"WORLD_SIZE": "8"}
    assert launch_secret(several) == ""
    assert launch_secret(several | {"ELASTIC_MOE_SECRET": "told to all of them\n"}) == "told to all of them"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error_file", ["", "/dev/null"])
def test_without_a_folder_of_torchrun_there_is_none(environ, error_file):
    assert launch_secret(environ | {"TORCHELASTIC_ERROR_FILE": error_file}) == ""
    assert launch_secret({}) == ""


def test_what_cannot_be_a_secret_is_refused_in_one_line(environ, tmp_path):
    with pytest.raises(ValueError, match="ELASTIC_MOE_SECRET: a secret must have 16 characters or more"):
        Launch.from_torchrun(environ | {"ELASTIC_MOE_SECRET": "short"})
    with pytest.raises(ValueError, match=r"elastic\.secret_file='/nowhere': cannot be read"):
        read_secret("/nowhere", "elastic.secret_file")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="a secret must have 16"):
        read_secret(str(tmp_path / "empty"), "elastic.secret_file")


def test_ranks_with_other_secrets_are_told_so():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        store = f"127.0.0.1:{probe.getsockname()[1]}"

    def start(rank: int, secret: str) -> str:
        launch = Launch(rank, 2, store=store, store_is_up=False, wire=Wire(secret))
        with pytest.raises(ValueError, match="does not have the secret of rank") as raised:
            meet(launch, Seat(SeatStart(launch)), 20)
        return str(raised.value)

    with ThreadPoolExecutor() as pool:
        told = list(pool.map(start, [0, 1], ["the secret of one node", "the secret of another"]))
    wanted = "rank {} does not have the secret of rank {}: give all nodes the same "
    wanted += "elastic.secret_file, or ELASTIC_MOE_SECRET"
    assert told == [wanted.format(1, 0), wanted.format(0, 1)]
