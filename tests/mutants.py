"""Do the fast tests notice a wrong line? Changes one expression or statement of a module, runs its tests, and counts.

    python tests/mutants.py [--num 30] [--seed 0] [--jobs 2] [MODULE ...]     (make mutants)

`mutants.toml` names the tests of each module; everything happens in a copy of the tree. mutmut 3.8 and cosmic-ray 8.7
were tried and do not fit: mutmut changes no decorated function (the balancer's search is all @njit, much else is a
property) and cannot sample; cosmic-ray changes the working tree, and either loads torch and transformers anew for each
mutant, which takes longer than the tests. Here a process that has loaded them forks for each mutant. numba does not
compile meanwhile: its cache does not see a change of a file that another one calls.
"""

import argparse
import ast
import contextlib
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("elastic_moe", "tests", "launch", "conf")
LOADED = ("fastapi", "httpx", "hypothesis", "numba", "openai", "pytest", "torch", "torch.distributed", "zmq.asyncio")
LOADED += ("transformers.generation.continuous_batching", "transformers.models.qwen3_moe.modeling_qwen3_moe")
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-m", "not slow and not gpu")
PYTEST += ("--deselect", "tests/unit/test_balance.py::test_warm_up_leaves_nothing_to_compile")
SWAPS = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift},
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "argmax": "argmin", "argmin": "argmax"}
UNCHANGED = ("annotation", "returns", "decorator_list")
TOLD = ("logger.", "log.", "'", '"', "if TYPE_CHECKING")


class Mutant(NamedTuple):
    """`where` the text from `start` to `end` is replaced by `new`."""

    start: int
    end: int
    where: str
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split())[:90] for text in (self.old, self.new))
        return f"{self.where}: {old}  ->  {new}"


def mutants(module: str, source: str) -> list[Mutant]:
    """Every mutant of a module, whose source is ASCII as all of ours."""
    starts, found = [0], []
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, new in changes(ast.parse(source)):
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        found.append(Mutant(start, end, f"{module}:{node.lineno}", source[start:end], new))
    return found


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The nodes below `node` and what they may become. Types, messages, logs, constants and docstrings stay."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            told = isinstance(child, ast.Expr | ast.If) and ast.unparse(child).startswith(TOLD)
            tuned = isinstance(child, ast.Assign) and ast.unparse(child.targets[0]).isupper()
            if name in UNCHANGED or not isinstance(child, ast.AST) or told or tuned:
                continue
            yield from ((child, new) for new in _becomes(child))
            if name == "test" and isinstance(child, ast.Name | ast.Attribute | ast.Call | ast.NamedExpr):
                yield child, f"(not ({ast.unparse(child)}))"
            if not isinstance(child, ast.JoinedStr | ast.Raise):
                yield from changes(child)


def _becomes(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Compare(left, [op], [right]) if type(op) in SWAPS:
            yield f"({ast.unparse(ast.Compare(left, [SWAPS[type(op)]()], [right]))})"
        case ast.BoolOp(op, values):
            yield f"({ast.unparse(ast.BoolOp(SWAPS[type(op)](), values))})"
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            yield f"({ast.unparse(ast.BinOp(left, SWAPS[type(op)](), right))})"
        case ast.UnaryOp(ast.Not() | ast.USub() | ast.Invert(), operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(bool(value)):
            yield str(not value)
        case ast.Constant(int(value) | float(value)):
            yield str(value + 1)
        case ast.Name(name, ast.Load()) if name in NAMES:
            yield NAMES[name]
        case ast.Attribute(value, name) if name in NAMES:
            yield f"({ast.unparse(value)}).{NAMES[name]}"
        case ast.Return(value) if value is not None and not isinstance(value, ast.Constant):
            yield "return None"
        case ast.Raise() | ast.Expr(ast.Call() | ast.Await()) | ast.AugAssign():
            yield "pass"
        case ast.Continue():
            yield "break"
        case ast.Break():
            yield "pass"


def exit_code(module: str, source: str, tests: list[str], limit_s: float) -> int:
    """Of `tests` with `source` in the place of `module`, in this process's own copy of the tree; -1 when it is late."""
    copy = Path(tempfile.gettempdir(), str(os.getpid()))
    if not copy.exists():
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / module).write_text(source)
    pid, deadline = os.fork(), time.monotonic() + limit_s
    if not pid:
        os.setsid()
        os.chdir(copy)
        with Path("output").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.path[:0] = [str(copy), str(copy / "tests")]
        os._exit(sys.modules["pytest"].main([*PYTEST, *(f"tests/{test}" for test in tests)]))
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what the tests have started too
    if not ended[0]:
        os.waitpid(pid, 0)
    shutil.copy(ROOT / module, copy / module)
    return os.waitstatus_to_exitcode(ended[1]) if ended[0] else -1


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description="Mutants of a module, and whether its fast tests notice them.")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="in mutants.toml, e.g. placement/repair; all")
    parser.add_argument("--num", type=int, default=30, help="mutants per module (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    options = parser.parse_args()
    table = tomllib.loads((ROOT / "tests/mutants.toml").read_text())
    os.environ |= {"NUMBA_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    for name in LOADED:
        importlib.import_module(name)
    total = killed = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as tempfile.tempdir, multiprocessing.Pool(options.jobs) as pool:
        for name in options.modules or table:
            module, begin = f"elastic_moe/{name}.py", time.monotonic()
            source, tests = (ROOT / module).read_text(), table[name]
            if pool.apply(exit_code, (module, source, tests, 600.0)):
                sys.exit(f"the tests of {name} fail, or take too long, without any change")
            every, limit_s = mutants(module, source), 10 + 3 * (time.monotonic() - begin)
            sample = random.Random(f"{options.seed} {name}").sample(every, min(options.num, len(every)))
            tasks = [(module, source[: m.start] + m.new + source[m.end :], tests, limit_s) for m in sample]
            codes = pool.starmap(exit_code, tasks, chunksize=1)
            left = sorted(mutant for mutant, code in zip(sample, codes, strict=True) if code == 0)
            total, killed = total + len(sample), killed + len(sample) - len(left)
            print(f"{name}: {len(sample) - len(left)} of {len(sample)}", *left, sep="\n    ", flush=True)
    print(f"all: {killed} of {total}, {killed / max(total, 1):.0%}")


if __name__ == "__main__":
    main()
