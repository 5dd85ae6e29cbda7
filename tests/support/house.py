"""The rules of the house: each a function from parsed source files to where they are broken.

No rule imports what it looks at, but `loaded`, which asks a fresh interpreter.
"""

import ast
import builtins
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

PACKAGE = "elastic_moe"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 80
"""Of a function in a `*_kernels.py`: a kernel cannot be cut where its parts would share what is in registers."""

NEVERS = {
    "torch": ("torch", "transformers"),
    "torch.distributed": ("torch.distributed",),
    "sockets": ("socket", "zmq", "http.client", "urllib.request"),
    "clock": ("time", "datetime.datetime"),
    "threads": (
        "elastic_moe.background.start_thread",
        "elastic_moe.background.start_worker",
        "threading.Thread",
        "concurrent.futures.ThreadPoolExecutor",
    ),
    "files": ("builtins.open", "io", "pathlib", "tempfile", "shutil", "?.read_text", "?.read_bytes"),
    "processes": ("subprocess", "multiprocessing", "os.fork"),
    "randomness": ("random", "secrets", "uuid", "numpy.random"),
}
"""What a sign may forbid its room, in these words, and the names by which that is used."""

THREADS = (
    "threading.Thread",
    "threading.Timer",
    "_thread",
    "concurrent.futures.ThreadPoolExecutor",
    "concurrent.futures.ProcessPoolExecutor",
    "multiprocessing.pool",
    "multiprocessing.dummy",
)
PICKLES = ("pickle", "cloudpickle", "dill", "shelve", "marshal", "torch.load", "torch.save", "multiprocessing")
OBJECTS = re.compile(r"torch\.distributed\.\w*_object(_list)?")
"""Collectives of torch that pickle what they send."""


@dataclass(frozen=True)
class Breach:
    """A rule is broken at a line of a file."""

    path: str
    line: int
    what: str

    @property
    def key(self) -> str:
        """What names it when lines move."""
        return f"{self.path}: {self.what}"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


@dataclass(frozen=True)
class Source:
    """One Python file; `path` is relative to the root, with slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def is_init(self) -> bool:
        return self.path.endswith("/__init__.py")

    @cached_property
    def imports(self) -> list[tuple[str, str, int]]:
        """(module, name or "", line) of every import, wherever it stands, and of `import_module("...")`."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found += [(alias.name, "", node.lineno) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node.module or "", node.level)
                found += [(base, alias.name, node.lineno) for alias in node.names]
            elif isinstance(node, ast.Call) and self.dotted(node.func) == "importlib.import_module":
                found += [(str(a.value), "", node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant)]
        return found

    def _absolute(self, module: str, level: int) -> str:
        if not level:
            return module
        package = self.module.split(".") if self.is_init else self.module.split(".")[:-1]
        return ".".join([*package[: len(package) - level + 1], *filter(None, [module])])

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Local name -> dotted name of what was imported under it."""
        found = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.name if alias.asname else alias.name.partition(".")[0]
                    found[alias.asname or name] = name
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node.module or "", node.level)
                found |= {alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names}
        return found

    def dotted(self, node: ast.AST) -> str:
        """The full name of what an expression names: `torch.distributed.all_reduce`, `builtins.open`; `?.read_text` for
        an attribute of something that was not imported."""
        if isinstance(node, ast.Attribute):
            return f"{self.dotted(node.value)}.{node.attr}"
        if isinstance(node, ast.Name):
            known = self.aliases.get(node.id)
            return known or (f"builtins.{node.id}" if hasattr(builtins, node.id) else "?")
        return "?"

    @cached_property
    def names(self) -> list[tuple[str, int]]:
        """(full name, line) of everything that is imported or used."""
        found = [(f"{module}.{name}" if name else module, line) for module, name, line in self.imports]
        for node in self.nodes:
            if isinstance(node, ast.Attribute | ast.Name):
                found.append((re.sub(r"^\?(\.\w+)*(?=\.\w+$)", "?", self.dotted(node)), node.lineno))
        return found

    @cached_property
    def makes(self) -> list[tuple[str, int]]:
        """(full name, line) of everything that is called or derived from."""
        heads = [node.func for node in self.nodes if isinstance(node, ast.Call)]
        heads += [base for node in self.nodes if isinstance(node, ast.ClassDef) for base in node.bases]
        return [(self.dotted(head), head.lineno) for head in heads]


def read(root: Path, *folders: str) -> list[Source]:
    """All Python files below `folders` of `root`."""
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return [Source(path.relative_to(root).as_posix(), path.read_text()) for path in paths]


def _below(name: str, prefixes: Collection[str]) -> bool:
    return f"{name}.".startswith(tuple(f"{prefix}." for prefix in prefixes))


def _first(path: str, uses: Sequence[tuple[str, int]], prefixes: Collection[str], what: str) -> Iterator[Breach]:
    """The first use of each name below `prefixes`, as breaches."""
    lines: dict[str, int] = {}
    dotted = tuple(f"{prefix}." for prefix in prefixes)
    for name, line in uses:
        if f"{name}.".startswith(dotted):
            lines.setdefault(name, line)
    shortest = [name for name in lines if not _below(name, lines.keys() - {name})]
    for name in sorted(shortest):
        yield Breach(path, min(lines[n] for n in lines if _below(n, [name])), f"{what} {name}")


def edges(files: Sequence[Source], below: tuple[str, ...] = ("",)) -> Iterator[tuple[Source, Source, int]]:
    """(importing file, imported file, line) of every import among `files` by those that begin with one of `below`."""
    homes = {file.module: file for file in files}
    for file in [file for file in files if file.path.startswith(below)]:
        for module, name, line in file.imports:
            target = homes.get(f"{module}.{name}") or homes.get(module)
            if target is not None:
                yield file, target, line


def rooms(text: str) -> list[str]:
    """What the table under "## Rooms" names in its first column, from the top: `errors.py`, `experts/`."""
    section = text.partition("\n## Rooms\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def _room(file: Source) -> str | None:
    """Of a file in the package; None for the package's own face, which may name all of them."""
    _, first, *deeper = file.path.split("/")
    return f"{first}/" if deeper else None if first == "__init__.py" else first


def arrows(files: Sequence[Source], order: Sequence[str]) -> Iterator[Breach]:
    """A room imports only rooms printed above it, at any place of a file; every room is printed, and there."""
    files = [file for file in files if file.path.startswith(f"{PACKAGE}/")]
    found = {_room(file) for file in files} - {None}
    for room in [room for room in order if room not in found]:
        yield Breach("docs/architecture.md", 0, f"there is no room {room}")
    for room in sorted(found - set(order)):
        yield Breach(f"{PACKAGE}/{room}", 0, "is no room of docs/architecture.md")
    place = {room: number for number, room in enumerate(order)}
    for file, target, line in edges(files):
        room, other = _room(file), _room(target)
        if room is not None and (other is None or place.get(other, 0) > place.get(room, 0)):
            yield Breach(file.path, line, f"imports {target.module}, which is below")


def walls(files: Sequence[Source], apart: Mapping[str, Collection[str]]) -> Iterator[Breach]:
    """Whatever begins with a key of `apart` imports nothing that begins with one of its values."""
    for file, target, line in edges(files, tuple(apart)):
        for here, there in apart.items():
            if file.path.startswith(here) and target.path.startswith(tuple(there)):
                yield Breach(file.path, line, f"imports {target.module} through a wall")


def circles(files: Sequence[Source]) -> Iterator[Breach]:
    """Modules that import each other in a circle; one is told if there are several."""
    graph: dict[str, set[str]] = {}
    for file, target, _ in edges(files):
        graph.setdefault(file.module, set()).add(target.module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        ring = list(reversed(error.args[1][:-1]))
        start = ring.index(min(ring))
        ring = [*ring[start:], *ring[:start]]
        yield Breach(ring[0], 0, f"imports itself by {' -> '.join([*ring[1:], ring[0]])}")


def sizes(files: Sequence[Source]) -> Iterator[Breach]:
    """Files and functions are short."""
    for file in files:
        num_lines = len(file.text.splitlines())
        if num_lines > MAX_FILE_LINES:
            yield Breach(file.path, 1, f"has more than {MAX_FILE_LINES} lines")
        most = MAX_KERNEL_LINES if file.path.endswith("_kernels.py") else MAX_FUNCTION_LINES
        for node in file.nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (node.end_lineno or 0) - node.lineno >= most:
                yield Breach(file.path, node.lineno, f"{node.name} has more than {most} lines")


def environment(files: Sequence[Source], allowed: tuple[str, ...]) -> Iterator[Breach]:
    """Only what begins with one of `allowed` reads the environment of its process."""
    for file in files:
        if not file.path.startswith(allowed):
            yield from _first(file.path, file.names, ["os.environ", "os.getenv", "os.environb", "os.putenv"], "uses")


def threads(files: Sequence[Source]) -> Iterator[Breach]:
    """Threads are started by background.py, so that none dies unheard."""
    for file in files:
        if file.path != f"{PACKAGE}/background.py":
            yield from _first(file.path, file.makes, THREADS, "starts its own thread by")


def pickles(files: Sequence[Source], own_ranks: tuple[str, ...] = ()) -> Iterator[Breach]:
    """Nothing pickles. `own_ranks` may use multiprocessing, whose pipes lead to their own children only."""
    for file in files:
        unwanted = set(PICKLES) - ({"multiprocessing"} if file.path.startswith(own_ranks or ("\0",)) else set())
        unwanted |= {name for name, _ in file.names if OBJECTS.fullmatch(name)}
        yield from _first(file.path, file.names, unwanted, "pickles by")


def loggers(files: Sequence[Source]) -> Iterator[Breach]:
    """A logger has the name of its module."""
    for file in files:
        for node in file.nodes:
            if not isinstance(node, ast.Call) or file.dotted(node.func) != "logging.getLogger":
                continue
            if any(isinstance(argument, ast.Constant | ast.JoinedStr) for argument in node.args):
                yield Breach(file.path, node.lineno, f"names a logger {ast.unparse(node.args[0])}")


def forbidden(sign: str) -> list[str]:
    """The words of NEVERS in what a sign says after "Never:"."""
    never = sign.partition("Never:")[2]
    return [word for word in NEVERS if re.search(rf"(?<![\w.]){re.escape(word)}(?!\.?\w)", never)]


def signs(files: Sequence[Source]) -> Iterator[Breach]:
    """Each folder has a sign, and its files keep to what that forbids; a room's says Owns, Uses and Never."""
    homes = {file.path: file for file in files}
    for folder in sorted({file.folder for file in files}):
        init = homes.get(f"{folder}/__init__.py")
        sign = (init and ast.get_docstring(init.tree)) or ""
        is_room = folder.startswith(f"{PACKAGE}/")
        if not sign:
            yield Breach(folder, 0, "has no sign")
        elif is_room and (
            len(sign.splitlines()) < 2 or re.findall(r"^(\w+):", sign, re.M) != ["Owns", "Uses", "Never"]
        ):
            yield Breach(folder, 0, "has a sign without lines Owns, Uses, Never")
        for word in forbidden(sign):
            for file in [file for file in files if file.folder == folder]:
                yield from _first(file.path, file.names, NEVERS[word], f"uses {word}, which its sign forbids:")


def face(files: Sequence[Source]) -> Iterator[Breach]:
    """What `elastic_moe` offers: `__all__`, `_HOMES` and the imports for type checkers name the same, each with a
    docstring at home. Of every other `__init__.py` `__all__` is what it imports."""
    homes = {file.module: file for file in files}
    for file in [file for file in files if file.is_init]:
        listed = _constant(file, "__all__") or []
        imported = {name: module for module, name, _ in file.imports if module.startswith(PACKAGE)}
        if sorted(imported) != sorted(listed):
            yield Breach(file.path, 1, f"imports {sorted(imported)}, but __all__ is {sorted(listed)}")
        if file.path == f"{PACKAGE}/__init__.py" and (_constant(file, "_HOMES") or {}) != imported:
            yield Breach(file.path, 1, "_HOMES differs from what it imports for type checkers")
        for name, module in imported.items():
            if not (module in homes and _is_public(homes[module], name, homes)):
                yield Breach(file.path, 1, f"{module} has no {name} with a docstring")


def _constant(file: Source, name: str) -> Any:
    values = [n.value for n in file.tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name]
    return ast.literal_eval(values[0]) if values else None


def _is_public(home: Source, name: str, homes: Mapping[str, Source]) -> bool:
    """Whether `home` defines `name` with a docstring, or assigns it, or is a room that offers it."""
    for node in home.tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) is not None
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if name in map(ast.unparse, targets):
            return True
    again = [homes[module] for module, imported, _ in home.imports if imported == name and module in homes]
    return home.is_init and any(_is_public(module, name, homes) for module in again)


def paths(texts: Mapping[str, str], known: Collection[str]) -> Iterator[Breach]:
    """Every .py and .sh that a page names is the end of a `known` path."""
    for page, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            for name in re.findall(r"(?<![\w./*-])[\w./-]*\w\.(?:py|sh)\b", line):
                if not any(path == name or path.endswith(f"/{name}") for path in known):
                    yield Breach(page, number, f"names {name}, which is not there")


_LOADED = """
import importlib, sys
unwanted = sys.argv[1].split(",")
for module in sys.argv[2:]:
    importlib.import_module(module)
    for name in [name for name in unwanted if name in sys.modules]:
        print(module, name)
        unwanted.remove(name)
"""


def loaded(root: Path, modules: Sequence[str], unwanted: Sequence[str]) -> Iterator[Breach]:
    """Modules that load one of `unwanted` when they are imported, in this order, in a process of their own."""
    run = subprocess.run(
        [sys.executable, "-c", _LOADED, ",".join(unwanted), *modules],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if run.returncode:
        yield Breach(str(root), 0, f"cannot be imported: {run.stderr.strip().splitlines()[-1]}")
    for module, name in (line.split() for line in run.stdout.splitlines()):
        yield Breach(module, 0, f"loads {name}")
