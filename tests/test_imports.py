"""Imports run one way: no module of the package imports, at whatever depth, one that imports it."""

import ast
import graphlib
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "visgraft"


def module_name(path: Path) -> str:
    parts = ("visgraft", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_the_import_graph_has_no_circle() -> None:
    files = {module_name(path): path for path in SOURCE.rglob("*.py")}
    # The package's own __init__ lists what users see; a module that reads its version does not lean on that list.
    graph = {name: imports_of(path, set(files)) - {name, "visgraft"} for name, path in files.items()}
    assert sum(map(len, graph.values())) > 200
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("visgraft.errors") < order.index("visgraft.sites") < order.index("visgraft.cli.app")


def test_methods_know_neither_timm_nor_the_command_line() -> None:
    for path in (SOURCE / "methods").glob("*.py"):
        if path.name == "__init__.py":
            continue
        text = path.read_text(encoding="utf-8")
        foreign = [n for n in imported(text) if n.split(".")[0] == "timm" or n.startswith("visgraft.cli")]
        assert not foreign, path.name


def imported(text: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(text)))
    direct = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return direct | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
