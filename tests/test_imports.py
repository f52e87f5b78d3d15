"""Imports run one way: no module of the package imports, at whatever depth, one that imports it."""

import ast
import graphlib
import inspect
import subprocess
import sys
from pathlib import Path

import visgraft

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


def import_graph() -> dict[str, set[str]]:
    files = {module_name(path): path for path in SOURCE.rglob("*.py")}
    # The package's own __init__ lists what users see; a module that reads its version does not lean on that list.
    return {name: imports_of(path, set(files)) - {name, "visgraft"} for name, path in files.items()}


def test_the_import_graph_has_no_circle() -> None:
    graph = import_graph()
    assert sum(map(len, graph.values())) > 200
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("visgraft.errors") < order.index("visgraft.core.sites") < order.index("visgraft.cli.app")


def test_rooms_above_the_methods_ask_for_them_where_all_are_registered() -> None:
    asking = {name for name, others in import_graph().items() if "visgraft.core.registry" in others}
    assert {name.split(".")[1] for name in asking} == {"core", "methods"}


ROOMS = (
    "version", "errors", "files", "option_types", "options", "pictures", "executors", "backbones", "core", "methods",
    "data", "drawn", "check", "adapters", "measure", "training", "bank", "export", "algebra", "serve", "search",
    "protocols", "bench", "report", "public", "cli",
)  # fmt: skip
"""From the ground up: a room imports only from rooms before it."""


def test_imports_between_rooms_run_down_one_order() -> None:
    room = {name: name.split(".")[1] for name in import_graph() if name.count(".")}
    assert set(room.values()) - {"__main__"} == set(ROOMS)
    upwards = [
        f"{name} imports {other}"
        for name, others in import_graph().items()
        for other in others
        if name in room and room[name] in ROOMS and ROOMS.index(room[other]) > ROOMS.index(room[name])
    ]
    assert not upwards
    behind = [
        f"{name} imports {other}"
        for name, others in import_graph().items()
        for other in others
        if name in room and room[name] != room[other] and any(part.startswith("_") for part in other.split("."))
    ]
    assert not behind


def test_docs_list_the_rooms_in_their_order_and_each_says_what_belongs_there() -> None:
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = [name.strip(" `/").removesuffix(".py") for cell in table for name in cell.split(",")]
    assert [name for name in listed if name in ROOMS] == list(ROOMS)
    for path in SOURCE.glob("*/__init__.py"):
        lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
        assert sum(bool(line) for line in lines) >= 3 and any("belong" in line for line in lines), path.parent.name


def test_no_file_and_no_function_is_too_long_to_read() -> None:
    """Of a function everything counts, from its first decorator on."""
    files, functions = dict[str, int](), dict[str, int]()
    for path in SOURCE.rglob("*.py"):
        text, place = path.read_text(encoding="utf-8"), path.relative_to(SOURCE).as_posix()
        files[place] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node, *node.decorator_list], key=lambda part: part.lineno).lineno
                functions[f"{place}: {node.name}"] = (node.end_lineno or 0) - first + 1
    assert len(files) > 200 and len(functions) > 2000
    assert {name: lines for name, lines in files.items() if lines > 400} == {}
    assert {name: lines for name, lines in functions.items() if lines > 60} == {}


def test_a_name_means_one_thing() -> None:
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).add(module_name(path))
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
    public = {name for name in dir(visgraft) if not name.startswith("_")}
    modules = {name.split(".")[1] for name in import_graph() if name.count(".")}
    assert {name for name in public & modules if not inspect.ismodule(getattr(visgraft, name))} == set()


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


NOT_NEEDED = (
    "typer", "rich", "click", "matplotlib", "platformdirs", "imagehash", "optuna", "onnx", "pandas", "pyarrow",
    "datasets", "tensorboard", "peft", "cv2", "accelerate",
)  # fmt: skip

BARE = """
import sys, tempfile
from importlib.machinery import PathFinder
from pathlib import Path

find, hidden = PathFinder.find_spec, sys.argv[1].split(",")
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.partition(".")[0] in hidden else find(name, *rest))
import psutil  # which itself needs `resource` where there is one
sys.modules["resource"] = None
import torch, visgraft
x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
images = visgraft.Images((x * 50 + 128).clamp(0, 255).to(torch.uint8), y, (0.5,) * 3, (0.5,) * 3)
model = visgraft.create_backbone(visgraft.Backbone("test_vit", "none", 32), 2)
visgraft.attach(model, visgraft.ALoREConfig())
visgraft.train(model, images, visgraft.TrainConfig(epochs=1, warmup_epochs=0.0, batch_size=4))
path = visgraft.save(model, Path(tempfile.mkdtemp()) / "adapter")
loaded = visgraft.load(path)
plain, certificate = visgraft.merge(loaded.model, x)
assert torch.equal(loaded.model(x), model(x)) and certificate.images == 4
assert visgraft.evaluate(plain, images).images == 4
print("ok", *sorted(name for name in sys.argv[1].split(",") if name in sys.modules))
"""


def test_attaching_training_storing_and_merging_need_none_of_the_other_libraries() -> None:
    """Nor `resource`, which Windows lacks."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, ",".join(NOT_NEEDED)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


LAZY = """
import sys, threading
import visgraft
assert "torch" not in sys.modules
visgraft.attach = "mine"
names, lacking = ("train", "Backbone", "SCTConfig", "compare", "predict", "load", "merge", "Split"), []
def ask(name):
    try:
        getattr(visgraft, name)
    except Exception as error:
        lacking.append(f"{name}: {error}")
threads = [threading.Thread(target=ask, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not lacking, lacking
assert visgraft.attach == "mine" and {"detach", "train", "LoRAConfig"} <= set(dir(visgraft))
from visgraft import *
assert callable(train) and not hasattr(visgraft, "no_such_name")
print("fine")
"""


def test_public_names_are_gathered_once_from_any_thread_and_replace_none() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


def test_whoever_asks_for_a_method_by_name_finds_it_whatever_was_imported_before() -> None:
    code = (
        "from visgraft.adapters.record import get_method; get_method('full').Config(); "
        "from visgraft.methods import list_methods; print(len(list_methods()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(visgraft.list_methods())
