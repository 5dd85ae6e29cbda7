"""The rules of the house (docs/architecture.md, "Rooms") hold, and each of them would notice."""

import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import pytest
from support import house
from support.house import Breach, Source

import elastic_moe

ROOT = Path(__file__).resolve().parents[2]
FILES = house.read(ROOT, "elastic_moe", "launch", "examples", "tests")
PACKAGE = [file for file in FILES if file.path.startswith("elastic_moe/")]
PROGRAMS = [file for file in FILES if not file.path.startswith("tests/")]
ORDER = house.rooms((ROOT / "docs/architecture.md").read_text())
GPU_SCRIPTS = sorted((ROOT / "tests/gpu").glob("*.sh"))
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "examples/README.md"]
}

WALLS = {
    "elastic_moe/": ("launch/", "examples/", "tests/", "elastic_moe/supervision/lighthouse.py"),
    "launch/": ("examples/", "tests/"),
    "examples/": ("tests/",),
    "elastic_moe/serving/engine/": ("elastic_moe/serving/front_end/", "elastic_moe/serving/supervisor.py"),
    "elastic_moe/serving/front_end/": ("elastic_moe/serving/engine/", "elastic_moe/serving/supervisor.py"),
    "elastic_moe/serving/supervisor.py": ("elastic_moe/serving/engine/", "elastic_moe/serving/front_end/"),
    "elastic_moe/serving/protocol.py": ("elastic_moe/serving/",),
    "elastic_moe/serving/starts.py": ("elastic_moe/serving/",),
}
"""Beside the order of rooms: who imports nothing of whom."""

ENVIRONMENT = (
    "launch/",
    "examples/",
    "elastic_moe/supervise.py",
    "elastic_moe/supervision/supervisor.py",
    "elastic_moe/group/backends.py",
)
"""Programs and the door read it, a supervisor hands its own on to its children, and NCCL is told things in no other
way."""

LIGHTHOUSE = "elastic_moe.supervision.lighthouse"
"""A process of its own, and torchft's library loads torch."""

PURE = {
    "elastic_moe/placement": {"torch.distributed", "sockets", "clock", "threads", "files", "randomness"},
    "elastic_moe/placement/balance": {"torch", "sockets", "clock", "threads", "files", "randomness"},
    "elastic_moe/supervision": {"torch"},
    "elastic_moe/serving": {"torch"},
}
"""What the signs of these rooms must forbid at least."""

EXCEPTIONS: dict[str, str] = {}
"""Breaches that are known, each with its reason. It is empty."""

RULES: dict[str, Callable[[], Iterable[Breach]]] = {
    "arrows": lambda: house.arrows(FILES, ORDER),
    "walls": lambda: house.walls(FILES, WALLS),
    "circles": lambda: house.circles(PROGRAMS),
    "sizes": lambda: house.sizes(FILES),
    "environment": lambda: house.environment(PROGRAMS, ENVIRONMENT),
    "threads": lambda: house.threads(PROGRAMS),
    "pickles": lambda: house.pickles(PROGRAMS, own_ranks=("launch/benchmarks/",)),
    "loggers": lambda: house.loggers(PROGRAMS),
    "signs": lambda: house.signs(
        [f for f in FILES if f.path.startswith(("elastic_moe/", "launch/", "tests/support/"))]
    ),
    "face": lambda: house.face(PACKAGE),
    "paths": lambda: house.paths(PAGES, [f.path for f in FILES] + [f"tests/gpu/{p.name}" for p in GPU_SCRIPTS]),
}


@cache
def breaches(rule: str) -> list[Breach]:
    return list(RULES[rule]())


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps(rule: str):
    found = [str(breach) for breach in breaches(rule) if breach.key not in EXCEPTIONS]
    assert not found, "\n" + "\n".join(found)


def test_every_exception_is_one():
    found = {breach.key for rule in RULES for breach in breaches(rule)}
    assert EXCEPTIONS.keys() <= found


def test_the_rules_look_at_the_house():
    assert len(PACKAGE) > 100
    assert {"errors.py", "placement/", "supervision/", "serving/"} <= set(ORDER)
    assert ORDER[0] == "errors.py"


@pytest.mark.parametrize("room", PURE)
def test_the_sign_of_a_pure_room_says_so(room: str):
    init = next(file for file in PACKAGE if file.path == f"{room}/__init__.py")
    assert PURE[room] <= set(house.forbidden(init.text))


def test_supervisors_load_neither_torch_nor_transformers_nor_numba():
    supervision = [
        f.module for f in PACKAGE if f.path.startswith("elastic_moe/supervision/") and f.module != LIGHTHOUSE
    ]
    modules = [
        "elastic_moe.config",
        *supervision,
        "elastic_moe.serving.supervisor",
        "elastic_moe.supervise",
        "launch.serve",
    ]
    assert len(supervision) > 3
    assert not list(house.loaded(ROOT, modules, ["torch", "transformers", "numba"]))


def test_the_face_answers_to_its_names_only():
    assert elastic_moe.Launch.__module__ == "elastic_moe.membership.launch"
    with pytest.raises(AttributeError, match="no attribute 'Lunch'"):
        elastic_moe.Lunch  # noqa: B018


def test_what_readers_are_told_to_import_is_exported():
    told = [PAGES["README.md"], *(file.text for file in FILES if file.path.startswith("examples/"))]
    lines = [line for text in told for line in re.findall(r"^from elastic_moe import (.+)$", text, re.M)]
    names = {name.strip() for line in lines for name in line.split(",")}
    assert names >= {"ElasticRuntime", "elasticize"}
    assert names <= set(elastic_moe.__all__)


def tree(root: Path, files: dict[str, str]) -> list[Source]:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return house.read(root, ".")


SIGN = '"""A room.\n\nOwns: it.\nUses: torch.\nNever: clock, files."""\n'
IN_ORDER = {
    "__init__.py": '"""The face."""\n',
    "errors.py": "",
    "low/__init__.py": SIGN,
    "low/a.py": 'class A:\n    """A."""\n',
    "high/__init__.py": SIGN,
    "high/b.py": "from elastic_moe.low import a\n",
}
arrows = partial(house.arrows, order=["errors.py", "low/", "high/"])
walls = partial(house.walls, apart={"elastic_moe/high/": ["elastic_moe/errors.py"]})
environment = partial(house.environment, allowed=("elastic_moe/high/",))
pickles = partial(house.pickles, own_ranks=("elastic_moe/high/",))
UP = "imports elastic_moe.high.b, which is below"
THREAD = "starts its own thread by threading.Thread"
NO_LINES = "has a sign without lines Owns, Uses, Never"


@pytest.mark.parametrize(
    ("rule", "changes", "expected"),
    [
        (arrows, {"low/a.py": "from elastic_moe.high import b"}, UP),
        (arrows, {"low/a.py": "import elastic_moe.high.b as c"}, UP),
        (arrows, {"low/a.py": "from ..high import b"}, UP),
        (arrows, {"low/a.py": "def f():\n    from elastic_moe.high.b import C"}, UP),
        (arrows, {"low/a.py": "if TYPE_CHECKING:\n    from elastic_moe.high.b import C"}, UP),
        (arrows, {"low/a.py": "from importlib import import_module as i\ni('elastic_moe.high.b')"}, UP),
        (arrows, {"low/a.py": "from elastic_moe import C"}, "imports elastic_moe, which is below"),
        (arrows, {"cellar/c.py": ""}, "is no room of docs/architecture.md"),
        (arrows, {"high/b.py": None, "high/__init__.py": None}, "there is no room high/"),
        (walls, {"high/b.py": "from elastic_moe.errors import E"}, "imports elastic_moe.errors through a wall"),
        (
            house.circles,
            {"low/a.py": "from elastic_moe.low import c", "low/c.py": "def f():\n    from elastic_moe.low.a import A"},
            "imports itself by elastic_moe.low.c -> elastic_moe.low.a",
        ),
        (house.sizes, {"low/a.py": "\n" * 401}, "has more than 400 lines"),
        (house.sizes, {"low/a.py": "class A:\n  async def f():\n" + "    x\n" * 60}, "f has more than 60 lines"),
        (house.sizes, {"low/a_kernels.py": "def f():\n" + "    x\n" * 80}, "f has more than 80 lines"),
        (
            environment,
            {"low/a.py": "import os as o\no.environ['A']", "high/b.py": "import os\nos.environ"},
            "uses os.environ",
        ),
        (environment, {"low/a.py": "from os import getenv"}, "uses os.getenv"),
        (house.threads, {"low/a.py": "import threading\nthreading.Thread(target=f)", "background.py": ""}, THREAD),
        (house.threads, {"low/a.py": "from threading import Thread as T\nclass A(T): ..."}, THREAD),
        (pickles, {"low/a.py": "def f():\n    import pickle"}, "pickles by pickle"),
        (
            pickles,
            {"low/a.py": "import torch\ntorch.load(p)", "high/b.py": "import multiprocessing"},
            "pickles by torch.load",
        ),
        (pickles, {"low/a.py": "import multiprocessing"}, "pickles by multiprocessing"),
        (
            pickles,
            {"low/a.py": "import torch.distributed as dist\ndist.all_gather_object(a, b)"},
            "pickles by torch.distributed.all_gather_object",
        ),
        (house.loggers, {"low/a.py": "import logging\nlogging.getLogger('moe')"}, "names a logger 'moe'"),
        (house.signs, {"low/__init__.py": ""}, "has no sign"),
        (house.signs, {"low/__init__.py": None}, "has no sign"),
        (house.signs, {"low/__init__.py": '"""A room."""'}, NO_LINES),
        (house.signs, {"low/__init__.py": SIGN.replace("Never", "Seldom")}, NO_LINES),
        (house.signs, {"low/a.py": "from time import sleep"}, "uses clock, which its sign forbids: time.sleep"),
        (house.signs, {"low/a.py": "def f(p): p.x.read_text()"}, "uses files, which its sign forbids: ?.read_text"),
        (house.face, {"low/__init__.py": "from elastic_moe.low.a import A"}, "imports ['A'], but __all__ is []"),
        (
            house.face,
            {"__init__.py": "from elastic_moe.low.a import A\n_HOMES = {'A': 'elastic_moe.low'}\n__all__ = ['A']"},
            "_HOMES differs from what it imports for type checkers",
        ),
        (
            house.face,
            {"low/__init__.py": "from elastic_moe.low.a import A\n__all__ = ['A']", "low/a.py": "class A: ..."},
            "elastic_moe.low.a has no A with a docstring",
        ),
    ],
)
def test_a_broken_rule_is_noticed(tmp_path: Path, rule: Callable, changes: dict[str, str | None], expected: str):
    assert not list(rule(tree(tmp_path / "before", in_package(IN_ORDER))))
    found = list(rule(tree(tmp_path / "after", in_package(IN_ORDER | changes))))
    assert [breach.what for breach in found] == [expected]


def in_package(files: dict[str, str | None]) -> dict[str, str]:
    return {f"elastic_moe/{path}": text for path, text in files.items() if text is not None}


def test_what_is_loaded_at_import_is_noticed(tmp_path: Path):
    tree(tmp_path, {"heavy.py": "", "low.py": "", "high.py": "import low\nimport heavy", "ill.py": "import absent"})
    assert not list(house.loaded(tmp_path, ["low"], ["heavy"]))
    assert [breach.key for breach in house.loaded(tmp_path, ["low", "high"], ["heavy"])] == ["high: loads heavy"]
    assert "No module named 'absent'" in str(next(iter(house.loaded(tmp_path, ["ill"], ["heavy"]))))


def test_a_page_that_names_what_is_not_there_is_noticed():
    known = ["elastic_moe/low/a.py", "tests/gpu/run.sh"]
    assert not list(house.paths({"page": "`low/a.py`, `a.py`\ntests/gpu/run.sh"}, known))
    found = [str(breach) for breach in house.paths({"page": "`a.py`\n`high/a.py b.sh`"}, known)]
    assert found == ["page:2: names high/a.py, which is not there", "page:2: names b.sh, which is not there"]
