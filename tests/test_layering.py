"""Who may import whom: the rooms of the house, read from the import statements."""

import ast
import sys
from pathlib import Path

import pytest

from zoo.layout import shelf

PACKAGE = Path(__file__).parents[1] / "zoo"

# A module may import the zoo's modules named here (a name stands for everything below it). Those of BASE know nothing
# of models, so everyone may use them.
BASE = {"zoo.errors", "zoo.files", "zoo.layout", "zoo.processes", "zoo.provenance", "zoo.tables"}
CONTRACT = BASE | {"zoo.cache", "zoo.config", "zoo.mixer", "zoo.ops"}
SPINE = CONTRACT | {"zoo.nn", "zoo.moe", "zoo.modeling", "zoo.heads", "zoo.registry"}
PUBLIC = SPINE | {"zoo", "zoo.segments", "zoo.checkpoint", "zoo.convert", "zoo.inspection", "zoo.evaluate", "zoo.tasks"}
ALLOWED = {
    "zoo.errors": set(),
    "zoo.files": set(),
    "zoo.layout": set(),
    "zoo.processes": set(),
    "zoo.provenance": {"zoo.layout"},
    "zoo.tables": {"zoo.files"},
    "zoo.checkpoint": set(),
    "zoo.convert": SPINE | {"zoo.checkpoint"},
    "zoo.cache": BASE,
    "zoo.registry": BASE | {"zoo.plugins"},
    "zoo.config": BASE | {"zoo.registry", "zoo.ops.dispatch"},
    "zoo.mixer": BASE | {"zoo.cache", "zoo.config"},
    "zoo.ops": BASE | {"zoo.ops"},
    "zoo.nn": CONTRACT,
    "zoo.moe": CONTRACT | {"zoo.nn"},
    "zoo.modeling": SPINE,
    "zoo.heads": SPINE,
    "zoo.segments": SPINE | {"zoo.segments"},
    "zoo.inspection": SPINE,
    "zoo.tasks": BASE | {"zoo.tasks"},
    "zoo.evaluate": PUBLIC | {"zoo.hub.scores"},
    "zoo.train": PUBLIC | {"zoo.train", "zoo.cli"},
    "zoo.selftest": BASE | {"zoo.ops"},
    "zoo.bench": PUBLIC | {"zoo.bench", "zoo.train"},
    "zoo.hub": PUBLIC | {"zoo.hub"},
    "zoo.charts": set(),
    "zoo.plots": PUBLIC | {"zoo.charts", "zoo.train.report"},
    "zoo.cli": PUBLIC | {"zoo.cli", "zoo.bench", "zoo.hub", "zoo.plots", "zoo.selftest", "zoo.train"},
    "zoo.plugins": BASE,
    "zoo": PUBLIC,
}
BUILDS_ON = {"jamba": {"zoo.plugins.mamba"}}
"""Plugins that derive from another of the tree, and which."""
EXTERNAL_OF_OPS = {"torch", "triton"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports; `from zoo import registry` counts as `zoo.registry` where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            modules = {f"{node.module}.{alias.name}" for alias in node.names if _is_module(node.module, alias.name)}
            found |= modules or {node.module}
    return found


def _is_module(package: str, name: str) -> bool:
    if package == "zoo":
        return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()
    return False


def _covered(module: str, allowed: set[str]) -> bool:
    return any(module == name or (name != "zoo" and module.startswith(f"{name}.")) for name in allowed)


def _module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path):
    module = _module_of(path)
    room = max((name for name in ALLOWED if module == name or module.startswith(f"{name}.")), key=len)
    used = {name for name in imports(path) if name == "zoo" or name.startswith("zoo.")}
    assert not {name for name in used if not _covered(name, ALLOWED[room])}, f"{module} may import {ALLOWED[room]}"
    if room == "zoo.ops":
        others = {name.split(".")[0] for name in imports(path)} - {"zoo"}
        assert others - EXTERNAL_OF_OPS <= sys.stdlib_module_names


@pytest.mark.parametrize("path", sorted(shelf("plugins").rglob("*.py")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_plugin_imports_the_spine_and_itself(path):
    name = path.relative_to(shelf("plugins")).parts[0]
    own = {f"zoo.plugins.{name}"} | BUILDS_ON.get(name, set())
    used = {name for name in imports(path) if name.split(".")[0] in ("zoo", "plugins")}
    assert not {name for name in used if not _covered(name, PUBLIC | own)}


def test_nothing_imports_a_plugin_by_its_path():
    for path in PACKAGE.rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith(("zoo.plugins.", "plugins"))], path


def test_a_plugin_is_small():
    for folder in shelf("plugins").iterdir():
        if folder.is_dir() and (folder / "__init__.py").exists():
            for path in folder.glob("*.py"):
                lines = len(path.read_text().splitlines())
                assert lines <= 350, f"{folder.name}/{path.name}: {lines} lines"
            assert (folder / "README.md").is_file(), f"{folder.name} has no README.md"
