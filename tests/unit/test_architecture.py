"""The arrows of docs/design.md, and what no module may do, read off the source; and that starting up stays light."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "posttrain"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "errors", "hub", "children", "folders"),
    ("native", "shortage"),
    (
        "data",
        "models",
        "objectives",
        "rewards",
        "parallel",
        "terminal",
        "events",
        "signals",
        "optimization",
        "optimizer_state",
    ),
    ("rollout",),
    ("snapshot", "checkpoint", "locks", "meter", "session", "backoff", "evaluate", "reference_ahead"),
    ("reference", "planner"),
    ("loop", "identity", "course", "annotation", "gauges"),
    ("keeping",),
    ("run", "export"),
    ("trainers",),
    ("runner",),
    ("commands",),
    ("cli", "web"),
    ("__init__", "__main__"),
)
"""A module may import from lines above its own, and from its own package; never from its own line, never below."""

NOT_FOR = {"loop": {"data", "models"}}
"""The loop knows no file format and no model family."""

HEAVY = ("torch", "transformers", "peft", "datasets", "pyarrow", "numpy", "pydantic")
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system", "os.popen", "yaml.load",
    "yaml.full_load", "yaml.unsafe_load", "numpy.load", "np.load",
}  # fmt: skip
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def _part(path: Path) -> str:
    """The top-level module or package that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def _imports(path: Path, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every module that a file names in an import, those inside functions included, in full."""
    package = ("posttrain", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else ())))
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or a chain of attributes, or nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return ""


def _arrows() -> Iterator[tuple[str, str, str]]:
    known = {part for layer in LAYERS for part in layer}
    for path in _files():
        for module, line in _imports(path, _tree(path)):
            names = module.split(".")
            if names[0] == "posttrain" and len(names) > 1 and names[1] in known and names[1] != _part(path):
                yield _part(path), names[1], f"{path.relative_to(PACKAGE)}:{line}"


def test_every_module_has_its_place() -> None:
    known = {part for layer in LAYERS for part in layer}
    missing = {_part(path) for path in _files()} - known
    assert not missing, f"give {sorted(missing)} a place in LAYERS, and in docs/design.md"


def test_arrows_point_one_way() -> None:
    rank = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    wrong = {
        f"{place}: {source} imports {target}"
        for source, target, place in _arrows()
        if rank[target] >= rank[source] or target in NOT_FOR.get(source, ())
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_only_parallel_imports_torch_distributed() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in _files()
        for module, line in _imports(path, _tree(path))
        if module.startswith("torch.distributed") and _part(path) != "parallel"
    ]
    used = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in _files()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Attribute) and _dotted(node) == "torch.distributed" and _part(path) != "parallel"
    ]
    assert not wrong + used


def test_nothing_runs_code_out_of_data() -> None:
    """No pickle, no evaluated strings, no shell: a model, a data set or a config can never run code."""
    wrong = []
    for path in _files():
        tree = _tree(path)
        where = path.relative_to(PACKAGE)
        wrong += [f"{where}:{n}: {m}" for m, n in _imports(path, tree) if m.split(".")[0] in FORBIDDEN_IMPORTS]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if _dotted(call.func) in FORBIDDEN_CALLS:
                wrong.append(f"{where}:{call.lineno}: {_dotted(call.func)}")
            if any(keyword.arg == "shell" and _is_true(keyword.value) for keyword in call.keywords):
                wrong.append(f"{where}:{call.lineno}: shell=True")
    assert not wrong, "\n".join(wrong)


def _is_true(node: ast.AST) -> bool:
    return not (isinstance(node, ast.Constant) and node.value is False)


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_says_what_it_does(path: Path) -> None:
    assert ast.get_docstring(_tree(path)), "a file opens with a paragraph: what it does, what it leaves out"


IMPORT = "import posttrain"
HELP = "from posttrain.cli import main; sys.argv = ['posttrain', '--help']\ntry: main()\nexcept SystemExit: pass"


def _seconds_and_modules(code: str) -> tuple[float, set[str]]:
    """Processor seconds of a fresh interpreter that runs `code`, and the modules it had loaded at its end."""
    script = f"import sys\n{code}\nprint('MODULES', *sorted(sys.modules), file=sys.stderr)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, set(done.stderr.split("MODULES", 1)[1].split())


@pytest.mark.parametrize("code", [IMPORT, HELP], ids=["import", "help"])
def test_start_up_is_light(code: str) -> None:
    seconds, modules = min((_seconds_and_modules(code) for _ in range(3)), key=lambda pair: pair[0])
    assert not modules & set(HEAVY)
    assert seconds < 0.5
