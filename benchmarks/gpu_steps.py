"""The parts of gpu.py on training steps: time and memory against the bound of step_time.py, and where the time goes."""

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import shared
import torch
from gpu_checks import METHODS, backbone, images
from step_time import bound, make_step, peers
from torch import Tensor, nn
from torch.nn import functional as F

import visgraft
from visgraft.measure.precision import frozen_weights_in_bf16, unfused_attention
from visgraft.methods import get_method

STEPPING = ("sct", "alore", "lora", "ssf", "bitfit", "adaptformer", "full", "linear")
SHAPES = [
    (name, count)
    for count in (64, 16)
    for name in ("vit_base_patch16_224", "vit_large_patch16_224", "swin_base_patch4_window7_224")
]
COMPILED = ("alore", "sct", "lora", "ssf")
GRAPHED = ("alore", "sct", "lora")


PEFT = importlib.util.find_spec("peft") is not None


def adapted(plain: nn.Module, method: str, x: Tensor, y: Tensor) -> nn.Module:
    """Return a copy with a method attached, in training mode."""
    return visgraft.attach(copy.deepcopy(plain), get_method(method).Config(), [(x, y)]).train()


@contextlib.contextmanager
def as_trained(models: dict[str, nn.Module]) -> Iterator[None]:
    """Hold the models as `train` does in bf16."""
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(frozen_weights_in_bf16(model))
            stack.enter_context(unfused_attention(model))
        yield


def step_memory(step: Callable[[], None], device: torch.device) -> int:
    """Return the bytes that a step takes at its peak beyond what is held between steps; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def with_peft(run: Any, part: str, plain: nn.Module) -> dict[str, nn.Module]:
    """Return models with huggingface/peft's LoRA; none, and a line that says so, where it is not installed."""
    if PEFT:
        return peers(lambda: copy.deepcopy(plain))
    run.record(part, name="peft", skipped="not installed (pip install peft)")
    return {}


def compare(run: Any, part: str, steps: dict[str, Callable[[], None]], what: dict[str, Any]) -> None:
    """Time steps in turns and record each against the mean of the two bounds of its round."""
    memory = {name: step_memory(step, run.device) for name, step in steps.items()}
    timed = {name: run.seconds(step, 3) for name, step in steps.items()}
    rounds = shared.in_turns(timed, 3 if run.tiny else 9)
    milliseconds = round(1000 * shared.quartiles([one["bound"] for one in rounds])[1], 3)
    for name in steps:
        low, middle, high = shared.quartiles([2 * one[name] / (one["bound"] + one["bound again"]) for one in rounds])
        # A CUDA graph holds its memory between steps.
        share = {"memory": round(memory[name] / memory["bound"], 3)} if memory["bound"] and part != "graphs" else {}
        ratio = [round(value, 4) for value in (low, middle, high)]
        run.record(part, **what, name=name, ratio=ratio, **share, bound_ms=milliseconds)


def eager_steps(run: Any) -> None:
    """Every method and huggingface/peft's LoRA against the bound, eager in bf16; the largest question first."""
    for name, count in SHAPES[1:3] if run.tiny else SHAPES:
        what = {"backbone": name, "batch": count}
        with run.measuring("steps", 25, **what) as ready:
            if ready:
                plain = backbone(run, name)
                x, y = images(run, plain, 4 if run.tiny else count)
                models: dict[str, nn.Module] = {
                    "bound": bound(copy.deepcopy(plain)),
                    "bound again": bound(copy.deepcopy(plain)),
                    **{method: adapted(plain, method, x, y) for method in STEPPING},
                }
                models |= with_peft(run, "steps", plain)
                with as_trained(models):
                    compare(run, "steps", {key: make_step(model, x, y, True) for key, model in models.items()}, what)


def graphed(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return a training step that replays one CUDA graph."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True, capturable=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def compiled_steps(run: Any) -> None:
    """CUDA graphs, then inductor, whose compiling takes most of the time: one model more at a time, then the next."""
    for name, count in (("vit_base_patch16_224", 64), ("vit_base_patch16_224", 16)):
        if run.device.type != "cuda":
            run.record("graphs", backbone=name, batch=count, skipped="CUDA graphs need a GPU")
            continue
        with run.measuring("graphs", 20, backbone=name, batch=count) as ready:
            if ready:
                graph_steps(run, name, count)
    for name, count in SHAPES[:1] if run.tiny else SHAPES:
        with run.measuring("compiled", 60, backbone=name, batch=count) as ready:
            if ready:
                inductor_steps(run, name, count)


def graph_steps(run: Any, name: str, count: int) -> None:
    """Replayed steps of methods against the bound's; a method that cannot be captured is recorded as such."""
    plain, what = backbone(run, name), {"backbone": name, "batch": count}
    x, y = images(run, plain, count)
    models = {"bound": bound(copy.deepcopy(plain)), "bound again": bound(copy.deepcopy(plain))}
    models |= {method: adapted(plain, method, x, y) for method in GRAPHED}
    steps: dict[str, Callable[[], None]] = {}
    with as_trained(models):
        for key, model in models.items():
            with run.measuring("graphs", **what, name=key):
                steps[key] = graphed(model, x, y)
        compare(run, "graphs", steps, what)


def inductor_steps(run: Any, name: str, count: int) -> None:
    """Compiled steps, each beside the compiled bounds as soon as it is compiled."""
    plain, what = backbone(run, name), {"backbone": name, "batch": count}
    x, y = images(run, plain, 4 if run.tiny else count)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # all share the code of one class
    options = {"fullgraph": True, "backend": "aot_eager" if run.tiny else "inductor"}
    first = bound(copy.deepcopy(plain))
    makers: dict[str, Callable[[], nn.Module]] = {
        method: lambda method=method: adapted(plain, method, x, y)  # type: ignore[misc]
        for method in (COMPILED[:1] if run.tiny else COMPILED)
    }
    if PEFT:
        makers["peft lora, qkv"] = lambda: with_peft(run, "compiled", plain)["peft lora, qkv"]
    with as_trained({"bound": first}):
        reference = make_step(torch.compile(first, **options), x, y, True)
        for key, make in makers.items():
            with run.measuring("compiled", 60, **what, name=key) as ready:
                if not ready:
                    break
                model = make()
                with as_trained({key: model}):
                    compiled = torch.compile(model, **options)
                    steps = {"bound": reference, key: make_step(compiled, x, y, True), "bound again": reference}
                    compare(run, "compiled", steps, what)


def profile(run: Any) -> None:
    """Where the time of alore's and sct's step goes beyond the bound's, kernel by kernel."""
    name, count = "vit_base_patch16_224", 4 if run.tiny else 64
    plain = backbone(run, name)
    x, y = images(run, plain, count)
    with run.measuring("profile", 20, backbone=name) as ready:
        if not ready:
            return
        models = {"bound": bound(copy.deepcopy(plain)), **{m: adapted(plain, m, x, y) for m in METHODS[:2]}}
        with as_trained(models):
            found = {key: kernels(make_step(model, x, y, True), run) for key, model in models.items()}
        for method in METHODS[:2]:
            beyond = {
                kernel: (spent - found["bound"].get(kernel, (0, 0))[0], calls - found["bound"].get(kernel, (0, 0))[1])
                for kernel, (spent, calls) in found[method].items()
            }
            total = sum(spent for spent, _ in found["bound"].values())
            for kernel in sorted(beyond, key=lambda one: -beyond[one][0])[:10]:
                spent, calls = beyond[kernel]
                share = round(spent / total, 4)
                run.record(
                    "profile", method=method, kernel=kernel[:90], us=round(spent, 1), calls=calls, of_bound=share
                )


def kernels(step: Callable[[], None], run: Any, steps: int = 3) -> dict[str, tuple[float, float]]:
    """Return {kernel: (µs, calls)} of one step."""
    on_gpu = run.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiled:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    found = {}
    for one in profiled.key_averages():
        spent = one.self_device_time_total if on_gpu else one.self_cpu_time_total
        found[one.key] = (spent / steps, round(one.count / steps, 1))
    return found
