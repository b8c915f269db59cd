"""The layers of the package: what imports what, no circles, no module that holds too much, and no lost import path."""

import ast
import importlib
import json
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trl_dpg


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_dpg"
LAYERS = [  # from the lowest up; in a layer from left to right
    ["text", "thinking", "student_text", "length_target", "environment", "redaction", "files", "ranks", "sampling"],
    ["rows", "provenance", "checkpoints", "stopping", "score_client", "score_limits"],
    ["kernels", "cross_entropy", "token_alignment", "alignment"],
    ["student"],
    ["metrics", "rewards"],
    ["metagradients"],
    ["verification"],
    ["tuning"],
    ["replay", "scored_batch", "metric_state", "several_students", "student_scorer", "attribution", "reward_checks"],
    ["reward"],
    ["student_arguments", "config", "generation", "intervals", "evaluation", "live_table", "callbacks", "guards"],
    ["rollouts", "reward_arguments", "run_setup", "restart", "serving", "toy", "practice", "memory"],
    ["auditing"],
    ["trainer", "report", "declaration"],
    ["scripts", "cli"],
]
ORDER = {room: place for place, room in enumerate(room for layer in LAYERS for room in layer)}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
IMPORT_PATHS = json.loads((Path(__file__).parent / "import_paths.json").read_text())


def imports(module):
    """Modules of the package that a module imports, anywhere in it."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "trl_dpg")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            if base.split(".")[0] != "trl_dpg":
                continue
            for alias in node.names:
                name = f"{base}.{alias.name}"
                public = trl_dpg._MODULES.get(alias.name) if base == "trl_dpg" else None
                yield name if name in FILES else f"trl_dpg.{public}" if public else base


def room(module):
    return module.split(".")[1]


@pytest.mark.parametrize("module", sorted(set(FILES) - {"trl_dpg"}))
def test_a_module_imports_only_from_lower_layers(module):
    for imported in set(imports(module)) - {"trl_dpg"}:  # the package itself has the version
        assert imported in FILES, f"{module} imports {imported}"
        same = room(imported) == room(module)
        assert same or ORDER[room(imported)] < ORDER[room(module)], f"{module} imports {imported}"


def test_there_are_no_circles_of_imports():
    graph = {module: set(imports(module)) - {module, "trl_dpg"} for module in FILES if module != "trl_dpg"}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_every_room_has_its_layer_in_the_docs():
    rooms = {module.split(".")[1] for module in FILES if module != "trl_dpg"}
    assert rooms == set(ORDER)
    shims = {"cross_entropy", "alignment"}
    for page in ("CONTRIBUTING.md", "docs/architecture.md"):
        text = (ROOT / page).read_text()
        missing = [name for name in rooms - shims if f"`{name}/`" not in text and f"`{name}.py`" not in text]
        assert not missing, (page, missing)


def lines(node):
    return node.end_lineno - node.lineno + 1


def is_dataclass(node):
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("module", sorted(FILES))
def test_modules_classes_and_functions_are_short(module):
    source = FILES[module].read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert lines(node) <= 60, node.name
        elif isinstance(node, ast.ClassDef) and not is_dataclass(node):
            assert lines(node) <= 300, node.name


@pytest.mark.parametrize("module", sorted(IMPORT_PATHS))
def test_every_import_path_of_the_first_release_works(module):
    found = importlib.import_module(module)
    missing = [name for name in IMPORT_PATHS[module] if not hasattr(found, name)]
    assert not missing
