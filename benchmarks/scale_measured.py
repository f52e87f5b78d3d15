"""What one core does with one thread: decode, resize, forward, train, answer; and what each piece of work costs.

    OMP_NUM_THREADS=1 python benchmarks/scale_measured.py             # about 3 minutes; appends to scale_measured.jsonl
    OMP_NUM_THREADS=1 python benchmarks/scale_measured.py --again driver,ray

One line per figure, with the processor's name. A group of figures is appended as soon as it is known: killed, the same
command goes on with the groups that this processor lacks. Each figure is the best of several short rounds, since what
else runs on a machine can only make it slower. Images, models, schedules and the driver are timed by the processor's
own time, of which waiting for a core is no part; lines and jobs by the clock. Of several lines on a figure, the best
one counts.

The pictures are the two photographs that come with scikit-learn, tiled with their mirror images and cut to squares at 1
to 1, so that there is as much detail in each pixel as in a photograph; those of 256 px are the ones of 500 px made
smaller, as in shards that were resized beforehand. Models have random weights, which take as long as trained ones.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import shared
import torch
from PIL import Image
from scale_simulated import best_lines
from sklearn.datasets import load_sample_images
from step_time import make_step
from torch import nn

import visgraft
from visgraft.backbones.creation import image_transform
from visgraft.bench.ledger import append, read_file
from visgraft.bench.plan import Cell, Request, plan, schedule
from visgraft.bench.running import TrialSources
from visgraft.bench.settings import Recipe
from visgraft.bench.sweep import sweep
from visgraft.bench.trial import Result
from visgraft.cli.predict_output import choose_table
from visgraft.data.dataset import Example
from visgraft.data.decode import open_image
from visgraft.executors.here import Here
from visgraft.executors.job import Event, Executor, Job, NextJob, TellEvent
from visgraft.executors.on_ray import OnRay
from visgraft.executors.processes import Processes
from visgraft.measure.precision import frozen_weights_in_bf16, make_compute, resolve_precision, unfused_attention
from visgraft.protocols.row import Parts
from visgraft.protocols.vtab import VTAB
from visgraft.serve.layout import TableLayout
from visgraft.serve.prediction import Prediction

HERE = Path(__file__).parent
FILE, RESULTS = HERE / "scale_measured.jsonl", HERE.parent / "results" / "offline.jsonl"
SIDES, PICTURES, QUALITY = (256, 500, 1000), 8, 90
MODELS = {"ViT-S/14 at 98 px": ("vit_small_patch14_dinov2", 98), "ViT-B/16 at 224 px": ("vit_base_patch16_224", 224)}
BATCH, BANKED, ADAPTERS = 8, 4, 4
Figures = Iterator[tuple[str, float, str]]
"""Name, value and unit of each."""


def best(act: Callable[[], object], rounds: int, clock: Callable[[], float] = time.process_time) -> float:
    """Return the least seconds that `act` took, after a call that does not count."""
    found = []
    for _ in range(rounds + 1):
        start = clock()
        act()
        found.append(clock() - start)
    return min(found[1:])


def _each(act: Callable[[Any], object], values: Sequence[Any]) -> None:
    for value in values:
        act(value)


def photographs(folder: Path) -> dict[int, list[Path]]:
    """Write squares of each side as JPEGs."""
    rng, tiled = np.random.default_rng(0), []
    for picture in load_sample_images().images:
        row = np.concatenate([picture, picture[:, ::-1]] * 2, axis=1)
        tiled.append(np.concatenate([row, row[::-1]] * 2, axis=0))
    found: dict[int, list[Path]] = {side: [] for side in SIDES}
    for number in range(PICTURES):
        picture = tiled[number % len(tiled)]
        for side in SIDES[1:]:
            top, left = (int(rng.integers(0, size - side)) for size in picture.shape[:2])
            cut = Image.fromarray(picture[top : top + side, left : left + side])
            sizes = {side: cut} if side != 500 else {500: cut, 256: cut.resize((256, 256), Image.Resampling.LANCZOS)}
            for size, one in sizes.items():
                found[size].append(folder / f"{number}-{size}.jpg")
                one.save(found[size][-1], quality=QUALITY)
    return found


def pictures(rounds: int) -> Figures:
    """Images decoded, and those resized and normalised to 224 px, each second; bytes of a JPEG."""
    transform = image_transform(visgraft.model_data_config(model_of("ViT-B/16 at 224 px")))
    with tempfile.TemporaryDirectory() as folder:
        for side, files in photographs(Path(folder)).items():
            decoded = [open_image(file) for file in files]
            yield f"JPEG of {side} px", sum(file.stat().st_size for file in files) / len(files), "bytes"
            taken = best(partial(_each, open_image, files), rounds)
            yield f"decoded, {side} px", len(files) / taken, "images/s"
            taken = best(partial(_each, transform, decoded), rounds)
            yield f"resized and normalised, {side} px", len(files) / taken, "images/s"


def model_of(name: str) -> nn.Module:
    """Return a plain backbone with ten outputs, frozen."""
    backbone, size = MODELS[name]
    model = visgraft.create_backbone(visgraft.Backbone(backbone, "none", size), 10)
    return model.eval().requires_grad_(False)


def attached(name: str, method: str, **options: Any) -> nn.Module:
    return visgraft.attach(model_of(name), visgraft.list_methods()[method].Config(**options))


def model(name: str, rounds: int) -> Figures:
    """Images forwarded and trained each second, in the precision in which this machine is faster; bytes of adapters."""
    compute, size = make_compute("auto"), MODELS[name][1]
    bf16 = compute.precision == "bf16"
    plain, x, y = model_of(name), torch.randn(BATCH, 3, size, size), torch.randint(10, (BATCH,))
    with torch.no_grad(), compute.autocast(), frozen_weights_in_bf16(plain, bf16):
        yield f"forwarded, {name}", BATCH / best(partial(plain, x), rounds), "images/s"
    for method, options in {"sct": {"score": "random"}, "alore": {}}.items():
        model = attached(name, method, **options).train()
        with tempfile.TemporaryDirectory() as folder:
            stored = visgraft.save(model, Path(folder) / "adapter")
            size_on_disk = sum(file.stat().st_size for file in stored.rglob("*") if file.is_file())
            yield f"adapter {method}, {name}", size_on_disk, "bytes"
        with frozen_weights_in_bf16(model, bf16), unfused_attention(model, bf16):
            yield f"trained {method}, {name}", BATCH / best(make_step(model, x, y, bf16), rounds), "images/s"


def bank(name: str, rounds: int) -> Figures:
    """Seconds that a bank takes for an image: with one adapter, with several for each, with one of several."""
    precision, size = resolve_precision("auto"), MODELS[name][1]
    x = torch.randn(BANKED, 3, size, size)
    for title, method, options in (
        ("linear", "linear", {}),
        ("alore in the last 2 blocks", "alore", {"last_blocks": 2}),
        ("alore in all blocks", "alore", {}),
    ):
        held, model = visgraft.Bank(model_of(name)), visgraft.Adapted.of(attached(name, method, **options))
        record = replace(model.record, precision=precision)
        for number in range(ADAPTERS):
            held.add(str(number), visgraft.Adapted(model.model, record))
        names = held.names
        one = best(partial(held.every, x, names[:1]), rounds)
        yield f"1 adapter, {title}, {name}", one / BANKED, "s/image"
        four = best(partial(held.every, x, names), rounds)
        yield f"{ADAPTERS} adapters, {title}, {name}", four / BANKED, "s/image"
    mixed = best(partial(held, x, names), rounds)
    yield f"{ADAPTERS} mixed adapters, {name}", mixed / BANKED, "s/image"


def answers(rounds: int) -> Figures:
    """Bytes of an answer as `predict` writes it: the image's path, the adapter, the class and its probability."""
    rng, count = np.random.default_rng(0), 10_000
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("csv", "parquet"):
            out = Path(folder) / f"answers.{suffix}"
            with choose_table(out)(out, TableLayout(1)) as write:
                for number in range(count):
                    classes = ((f"class_{rng.integers(100):03d}", float(np.float32(rng.random()))),)
                    write(Prediction(Path(f"images/{number // 1000:06d}/{number:09d}.jpg"), "adapter_0001", classes))
            yield f"answer, {suffix}", out.stat().st_size / count, "bytes"


class AtOnce:
    """Has the result of every trial at once, and ends after so many."""

    places = 1

    def __init__(self, most: int, template: Result) -> None:
        self.left, self.template = most, template

    def run(self, next_job: NextJob, tell: TellEvent) -> None:
        """See `Executor`."""
        while self.left and (job := next_job()) is not None:
            self.left -= 1
            tell(Event(job.key, "started", ""))
            trial = job.work.args[0]
            tell(Event(job.key, "done", replace(self.template, trial=trial)))


def vtab_cells() -> tuple[list[Cell], Any]:
    """Return the plan of VTAB-1k with every method that adds something, on images that nobody looks for."""
    methods = tuple(name for name in visgraft.list_methods() if name not in ("full", "linear", "partial"))

    def opened(folder: Path, task: Any, seed: int) -> Parts:
        names = tuple(str(number) for number in range(task.classes))
        train, val, test = ((Example(Path(f"{part}.png"), 0, None, bytes),) for part in ("train", "val", "test"))
        return Parts(names, train, val, {"test": test})

    rows = replace(VTAB, tasks=tuple(replace(task, open=opened) for task in VTAB.tasks))
    backbone = visgraft.Backbone("vit_base_patch16_224", "none", 224)
    request = Request(rows, Path(), methods, backbone, Recipe(), seeds=(0, 1, 2), precision="fp32", any_size=True)
    return plan(request), rows


def driver(rounds: int) -> Figures:
    """Seconds in which one process schedules and writes down a trial of VTAB-1k."""
    (cells, rows), template, most = vtab_cells(), read_file(RESULTS)[0], 10
    yield "trials of VTAB-1k", sum(cell.total for cell in cells), "trials"
    yield "schedule, VTAB-1k", best(lambda: schedule(cells, {}), rounds), "s"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ledger.jsonl"
        yield "line of the ledger", best(lambda: append(file, template), 10 * rounds, time.perf_counter), "s"

        def run() -> None:
            again = Path(folder) / "sweep.jsonl"
            again.unlink(missing_ok=True)
            sweep(cells, TrialSources(rows, Path()), again, AtOnce(most, template))

        yield "driver, trial of VTAB-1k", best(run, rounds) / most, "s"


def job_seconds(executor: Executor, jobs: int) -> float:
    """Return the seconds that each of so many jobs takes which do nothing."""
    waiting = [Job(str(number), "nothing", str) for number in range(jobs)]
    start = time.perf_counter()
    executor.run(lambda: waiting.pop() if waiting else None, lambda event: None)
    return (time.perf_counter() - start) / jobs


def local(rounds: int) -> Figures:
    """Seconds of a job that does nothing, in this process and in one of its own."""
    yield "job, here", min(job_seconds(Here(), 1000) for _ in range(rounds)), "s"
    processes = Processes(1, ["visgraft.bench.sweep"])
    job_seconds(processes, 1)  # the process that the others start from
    yield "job, processes", min(job_seconds(processes, 5) for _ in range(min(rounds, 3))), "s"


def ray(rounds: int) -> Figures:
    """Seconds of a job that does nothing on Ray, on one node with one job at a time."""
    kept = OnRay(most=1, fresh=False)
    job_seconds(kept, 2)
    yield "job, ray, process kept", min(job_seconds(kept, 50) for _ in range(min(rounds, 3))), "s"
    yield "job, ray, fresh process", min(job_seconds(OnRay(most=1), 2) for _ in range(2)), "s"


GROUPS: Mapping[str, Callable[[int], Figures]] = {
    **{one.__name__: one for one in (pictures, answers, driver, local, ray)},
    **{f"{one.__name__} {name}": partial(one, name) for name in MODELS for one in (model, bank)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--again", default="", help="groups to measure again, of " + ",".join(GROUPS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    facts = shared.machine() | {"precision": resolve_precision("auto")}
    for group, measure in GROUPS.items():
        lines = asked.out.read_text(encoding="utf-8").splitlines() if asked.out.exists() else []
        known = {line["group"] for line in map(json.loads, lines) if line["cpu"] == facts["cpu"]}
        if group in known and group not in asked.again.split(","):
            continue
        found = list(measure(asked.rounds))  # a group is written whole
        text = io.StringIO()
        for name, value, unit in found:
            line = {"group": group, "name": name, "value": float(f"{value:.4g}"), "unit": unit, "rounds": asked.rounds}
            text.write(json.dumps(line | facts) + "\n")
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(text.getvalue())
    best_ones = best_lines(asked.out, facts["cpu"])
    rows = [[one["name"], one["unit"], f"{one['value']:.4g}"] for one in best_ones]
    print(shared.table(["figure", "unit", facts["cpu"]], rows))


if __name__ == "__main__":
    main()
