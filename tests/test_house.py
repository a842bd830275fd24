"""The structure of the package: which room may import which, and what `lavita --help` may load."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lavita

PACKAGE = Path(lavita.__file__).parent
REPOSITORY = Path(__file__).parents[1]

# What each room may import besides itself. Benchmarks, tests and tools may import every room; no room imports them.
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "video": {"core"},
    "models": {"core"},
    "data": {"core", "video", "models"},
    "sampling": {"core", "video", "models", "data"},
    "evaluation": {"core", "video", "models", "data", "sampling"},
    "training": {"core", "video", "models", "data", "sampling", "evaluation"},
    "studies": {"core", "video", "models", "data", "sampling", "evaluation", "training"},
    "demo": {"core", "video", "models", "data", "sampling", "evaluation", "training"},
    "cli": {"core", "video", "models", "data", "sampling", "evaluation", "training", "studies", "demo"},
}
OUTSIDE = {"benchmarks", "tests", "tools"}
# Imports of these take up to seconds, so that `lavita --help` must not load them.
HEAVY = {"torch", "diffusers", "transformers", "matplotlib", "av"}
MOST_LINES = 400


@dataclass(frozen=True)
class Import:
    """An import of a module, or of a name in it."""

    module: str
    """In full: `lavita.core.files`."""
    name: str
    """The imported name; empty for a module."""
    line: int
    relative: bool
    when_loaded: bool
    """Whether it runs when the importing module is loaded, not in a function or for type checkers only."""


@dataclass(frozen=True)
class Module:
    """A source file."""

    name: str
    """In full, of a package that of its folder: `lavita.core`."""
    file: Path
    num_lines: int
    imports: tuple[Import, ...]

    @property
    def room(self) -> str:
        """Second part of the name; empty for the package itself and for `__main__`."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 and parts[1] != "__main__" else ""


Modules = dict[str, Module]


# ---- reading


def read_modules(folder: Path) -> Modules:
    """All modules of a package or folder of scripts, by name."""
    files = {}
    for file in sorted(folder.rglob("*.py")):
        parts = [folder.name, *file.relative_to(folder).with_suffix("").parts]
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    modules = {}
    for name, file in files.items():
        text = file.read_text(encoding="utf-8")
        imports = tuple(read_imports(ast.parse(text), name, file.stem == "__init__", set(files)))
        modules[name] = Module(name, file, len(text.splitlines()), imports)
    return modules


def read_imports(tree: ast.AST, name: str, is_package: bool, known: set[str]) -> Iterator[Import]:
    """All imports of a module, at any depth; `from a import b` is one of the module `a.b` if there is such a module."""

    def visit(node: ast.AST, when_loaded: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", node.lineno, False, when_loaded)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                if f"{base}.{alias.name}" in known:
                    yield Import(f"{base}.{alias.name}", "", node.lineno, node.level > 0, when_loaded)
                else:
                    yield Import(base, alias.name, node.lineno, node.level > 0, when_loaded)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for child in ast.iter_child_nodes(node):
                yield from visit(child, False)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, when_loaded)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, when_loaded)

    return visit(tree, True)


# ---- rules: each gives one message per violation


def check_rooms(modules: Modules) -> list[str]:
    """Every module is in a room and imports only from the rooms that this room may import."""
    found = []
    for module in modules.values():
        if module.room not in ROOMS:
            if module.room:
                found.append(f"{module.name}: is in no room; rooms are {', '.join(ROOMS)}")
            continue
        for item in module.imports:
            top, _, rest = item.module.partition(".")
            room = rest.partition(".")[0]
            if top in OUTSIDE:
                found.append(f"{module.name}:{item.line} imports {item.module}: nothing in lavita may import {top}")
            elif top == "lavita" and room and room != module.room and room not in ROOMS[module.room]:
                allowed = ", ".join(sorted(ROOMS[module.room])) or "no other room"
                found.append(f"{module.name}:{item.line} imports {item.module}: {module.room} may import {allowed}")
    return found


def check_public_face(modules: Modules) -> list[str]:
    """The package itself imports its rooms lazily, and `__main__` only the commands."""
    found = []
    for name, allowed in (("lavita", ""), ("lavita.__main__", "lavita.cli")):
        for item in modules[name].imports if name in modules else ():
            if item.when_loaded and item.module.startswith("lavita") and item.module != allowed:
                found.append(f"{name}:{item.line} imports {item.module} when it is loaded")
    return found


def check_cycles(modules: Modules) -> list[str]:
    """No two modules import each other, directly or through others, not even inside functions."""
    # The package itself has lazy names only (see above), so that every module may import its version.
    graph = {
        module.name: sorted({item.module for item in module.imports} & (set(modules) - {"lavita"}))
        for module in modules.values()
        if module.name != "lavita"
    }
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            cycle = path[path.index(name) :]
            first = cycle.index(min(cycle))
            found.append("cycle: " + " -> ".join([*cycle[first:], *cycle[: first + 1]]))
        elif name not in done:
            for target in graph[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def check_lengths(modules: Modules) -> list[str]:
    """Files are short enough to be read in one go."""
    return [
        f"{module.name}: has {module.num_lines} lines; at most {MOST_LINES} are allowed"
        for module in modules.values()
        if module.num_lines > MOST_LINES
    ]


def check_absolute(modules: Modules) -> list[str]:
    """No relative imports."""
    return [
        f"{module.name}:{item.line} imports {item.module} relatively"
        for module in modules.values()
        for item in module.imports
        if item.relative
    ]


def check_private(modules: Modules) -> list[str]:
    """Names that begin with an underscore stay in their module."""
    return [
        f"{module.name}:{item.line} imports the private {item.module}.{item.name}"
        for module in modules.values()
        for item in module.imports
        if item.module in modules and item.name.startswith("_") and not item.name.startswith("__")
    ]


def check_help(modules: Modules) -> list[str]:
    """What `lavita --help` loads does not load heavy libraries."""
    found, loaded = [], set()
    waiting: list[str] = ["lavita.__main__", "lavita.cli"]
    while waiting:
        name = waiting.pop()
        if name in loaded or name not in modules:
            continue
        loaded.add(name)
        waiting += [name.rpartition(".")[0]]  # loading a module loads its package first
        for item in modules[name].imports:
            if item.when_loaded and item.module.partition(".")[0] in HEAVY:
                found.append(f"{name}:{item.line} imports {item.module}, but `lavita --help` loads {name}")
            elif item.when_loaded:
                waiting.append(item.module)
    return found


def check_torchvision(modules: Modules) -> list[str]:
    """Nothing needs torchvision, whose build has to match torch's."""
    return [
        f"{module.name}:{item.line} imports {item.module}"
        for module in modules.values()
        for item in module.imports
        if item.module.partition(".")[0] == "torchvision"
    ]


def check_encodings(modules: Modules) -> list[str]:
    """Text files name their encoding, also where ruff does not see that something is a path."""
    return [
        f"{module.name}:{node.lineno} calls {node.func.attr} without encoding"
        for module in modules.values()
        for node in ast.walk(ast.parse(module.file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in {"read_text", "write_text"} and all(word.arg != "encoding" for word in node.keywords)
    ]


RULES: tuple[Callable[[Modules], list[str]], ...] = (
    check_rooms,
    check_public_face,
    check_cycles,
    check_lengths,
    check_absolute,
    check_private,
    check_help,
    check_torchvision,
    check_encodings,
)
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.removeprefix("check_"))


# ---- the house


@pytest.fixture(scope="module")
def package() -> Modules:
    return read_modules(PACKAGE)


@every_rule
def test_the_package(rule: Callable[[Modules], list[str]], package: Modules) -> None:
    assert len(package) > 80
    found = rule(package)
    assert not found, "\n".join([str(rule.__doc__), *found])


@pytest.mark.parametrize("folder", ["benchmarks", "tests", "tools"])
def test_what_is_around_the_package(folder: str, package: Modules) -> None:
    modules = read_modules(REPOSITORY / folder)
    assert modules
    found = check_absolute(modules) + check_torchvision(modules) + check_cycles(modules)
    if folder != "tests":
        found += check_encodings(modules)
    if folder == "benchmarks":
        found += [line for line in check_private({**package, **modules}) if line.startswith(folder)]
    assert not found, "\n".join(found)


# ---- each rule can fail


HOUSE = {
    "__init__.py": "if TYPE_CHECKING:\n    from lavita.cli import main\n__version__ = '1'",
    "__main__.py": "from lavita.cli import main",
    "cli/__init__.py": "import typer\nfrom lavita.cli.options import app",
    "cli/options.py": "def run():\n    import torch\n    from lavita.training.train import train",
    "core/files.py": "import torch\nfrom lavita import __version__",
    "video/__init__.py": "",
    "training/train.py": "import torch\nfrom lavita.core import files\nfrom lavita.core.files import write",
}


def build(folder: Path, files: dict[str, str]) -> Modules:
    """Writes a package `lavita` and reads it back."""
    for name, text in files.items():
        (folder / "lavita" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "lavita" / name).write_text(text, encoding="utf-8")
    return read_modules(folder / "lavita")


@every_rule
def test_a_small_house_that_keeps_all_rules(rule: Callable[[Modules], list[str]], tmp_path: Path) -> None:
    assert rule(build(tmp_path, HOUSE)) == []


@pytest.mark.parametrize(
    ("rule", "file", "text", "message"),
    [
        (
            check_rooms,
            "core/a.py",
            "from lavita.video.reading import read",
            "lavita.core.a:1 imports lavita.video.reading: core may import no other room",
        ),
        (
            check_rooms,
            "video/a.py",
            "\nimport lavita.models.blocks",
            "lavita.video.a:2 imports lavita.models.blocks: video may import core",
        ),
        (
            check_rooms,
            "core/a.py",
            "from lavita import video",
            "lavita.core.a:1 imports lavita.video: core may import no other room",
        ),
        (
            check_rooms,
            "core/a.py",
            "def f():\n    from lavita.training import train",
            "lavita.core.a:2 imports lavita.training.train: core may import no other room",
        ),
        (
            check_rooms,
            "core/a.py",
            "if TYPE_CHECKING:\n    import lavita.cli",
            "lavita.core.a:2 imports lavita.cli: core may import no other room",
        ),
        (
            check_rooms,
            "core/a.py",
            "from benchmarks.speed import peaks",
            "lavita.core.a:1 imports benchmarks.speed: nothing in lavita may import benchmarks",
        ),
        (check_rooms, "stray.py", "", "lavita.stray: is in no room; rooms are core, video"),
        (check_rooms, "attic/a.py", "", "lavita.attic.a: is in no room"),
        (
            check_public_face,
            "__init__.py",
            "from lavita.core import files",
            "lavita:1 imports lavita.core.files when it is loaded",
        ),
        (
            check_public_face,
            "__main__.py",
            "import lavita.core.files",
            "lavita.__main__:1 imports lavita.core.files when it is loaded",
        ),
        (
            check_cycles,
            "core/files.py",
            "from lavita.core.files import write",
            "cycle: lavita.core.files -> lavita.core.files",
        ),
        (
            check_cycles,
            "core/files.py",
            "def f():\n    from lavita.training import train",
            "cycle: lavita.core.files -> lavita.training.train -> lavita.core.files",
        ),
        (check_lengths, "core/files.py", "x = 1\n" * 401, "lavita.core.files: has 401 lines; at most 400 are allowed"),
        (
            check_absolute,
            "core/a.py",
            "from .files import write",
            "lavita.core.a:1 imports lavita.core.files relatively",
        ),
        (
            check_absolute,
            "core/a.py",
            "from ..training import train",
            "lavita.core.a:1 imports lavita.training.train relatively",
        ),
        (
            check_absolute,
            "core/__init__.py",
            "from . import files",
            "lavita.core:1 imports lavita.core.files relatively",
        ),
        (
            check_private,
            "core/a.py",
            "from lavita.core.files import _write",
            "lavita.core.a:1 imports the private lavita.core.files._write",
        ),
        (
            check_help,
            "cli/options.py",
            "import torch.nn",
            "lavita.cli.options:1 imports torch.nn, but `lavita --help` loads lavita.cli.options",
        ),
        (
            check_help,
            "cli/options.py",
            "from lavita.training.train import train",
            "lavita.core.files:1 imports torch, but `lavita --help` loads lavita.core.files",
        ),
        (
            check_help,
            "__init__.py",
            "class A:\n    from matplotlib import pyplot",
            "lavita:2 imports matplotlib, but `lavita --help` loads lavita",
        ),
        (
            check_torchvision,
            "core/a.py",
            "def f():\n    from torchvision.io import read",
            "lavita.core.a:2 imports torchvision.io",
        ),
        (
            check_encodings,
            "core/a.py",
            "def f(row):\n    return row.file.read_text()",
            "lavita.core.a:2 calls read_text without encoding",
        ),
    ],
)
def test_a_violation_is_named(
    rule: Callable[[Modules], list[str]], file: str, text: str, message: str, tmp_path: Path
) -> None:
    found = rule(build(tmp_path, {**HOUSE, file: text}))
    assert any(line.startswith(message) for line in found), found
