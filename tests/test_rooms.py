"""The order of the rooms: imports run downwards only, and only scripts create an Accelerator."""

import ast
import graphlib
from pathlib import Path

from conftest import ROOT

# from top to bottom; rooms of one level do not import each other
LEVELS = [
    {"reporting"},
    {"evaluation"},
    {"retrieval", "cli"},
    {"training", "models", "data"},
    {"tables"},
    {"fast", "files", "errors", "processes", "progress"},
]
LEVEL = {room: depth for depth, rooms in enumerate(LEVELS) for room in rooms}
MODULES = sorted((ROOT / "utils").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Modules of the project that a file imports, also within its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {module_name(module) for module in MODULES}
            found |= (submodules & modules) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("utils", "train_retrieve", "train_summarize",
                                                             "retrieve_and_summarize", "conftest")}  # fmt: skip


def test_imports_run_downwards_only():
    upwards = []
    for path in MODULES:
        importer = module_name(path)
        for name in imports_of(path):
            rooms = [module.split(".")[1] if "." in module else module for module in (importer, name)]
            if rooms[0] != rooms[1] and not LEVEL.get(rooms[1], -1) > LEVEL[rooms[0]]:
                upwards.append(f"{importer} imports {name}")
    assert not upwards


def test_no_circle_of_modules():
    graph = {module_name(path): imports_of(path) for path in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_room_has_its_place_and_says_what_it_is_for():
    rooms = {path.relative_to(ROOT / "utils").parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert rooms <= set(LEVEL)
    silent = [str(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_only_scripts_create_an_accelerator():
    for path in MODULES:
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        assert "Accelerator" not in {getattr(call, "id", getattr(call, "attr", "")) for call in calls}, path
