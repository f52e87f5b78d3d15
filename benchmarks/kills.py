"""Kill -9 at every kind of write: does `train`, `save` or `merge` ever leave a file that is not whole?

    OMP_NUM_THREADS=1 python benchmarks/kills.py            # 20 kills each

A write point is a moment just before, in the middle of, or just after a call that writes. A first run counts them; then
a fresh process is killed at points spread evenly over all of them, and what it left is opened:

- `train`: the adapter is absent or loads; the state is absent or reads; and `--resume` ends in the very weights that a
  run without a kill has;
- `save` over an earlier adapter: the folder holds the old tensors or the new ones, all of them;
- `merge` over an earlier merged model: timm opens the old model or the new one.

Prints one line per point and exits with 1 if anything was lost.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm.models._hub
import torch
from PIL import Image

import visgraft
from visgraft import files
from visgraft.adapters.directory import TENSORS
from visgraft.export.plain import merge_adapter, reopen_plain
from visgraft.methods import get_method
from visgraft.training import keeping
from visgraft.training.resume import state_file
from visgraft.training.run import train_folder

BACKBONE = visgraft.Backbone("test_vit", "none", 32)
LORA = get_method("lora").Config()
RECIPE = visgraft.TrainConfig(epochs=4, batch_size=16, precision="fp32")


class Points:
    """Counts write points and kills this process at one of them."""

    def __init__(self, victim: int | None = None, log: Path | None = None) -> None:
        self.count, self.victim, self.log = 0, victim, log

    def reach(self, name: str) -> None:
        """Pass a point, or die there."""
        self.count += 1
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{name}\n")
        if self.count == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str, half: Callable[..., None] | None = None) -> None:
        """Put points before, within (where `half` writes half) and after every call of a function."""
        real = getattr(owner, name)

        def pointed(*arguments: Any, **options: Any) -> Any:
            self.reach(f"before {name}")
            if half is not None:
                if self.count + 1 == self.victim:
                    half(*arguments, **options)
                self.reach(f"within {name}")
            result = real(*arguments, **options)
            self.reach(f"after {name}")
            return result

        setattr(owner, name, pointed)

    def arm(self) -> None:
        """Stand at every function through which visgraft writes."""

        def half_tensors(tensors: Any, filename: Any, *rest: Any, **options: Any) -> None:
            content = safetensors.torch.save(tensors)
            Path(filename).write_bytes(content[: len(content) // 2])

        def half_text(path: Path, text: str, *rest: Any, **options: Any) -> None:
            path.write_bytes(text.encode()[: len(text) // 2])

        self.around(safetensors.torch, "save_file", half_tensors)
        timm.models._hub.safetensors.torch.save_file = safetensors.torch.save_file
        self.around(Path, "write_text", half_text)
        for owner, name in ((files.os, "fsync"), (files.os, "replace"), (files.os, "rename"), (files, "_swap")):
            self.around(owner, name)
        self.around(files.tempfile, "mkstemp")
        self.around(files.tempfile, "mkdtemp")
        self.around(files.shutil, "rmtree")


def in_child(work: Callable[[], Any], points: Points | None) -> int:
    """Run `work` in a process of its own; returns the signal that ended it, 0 for none."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if points is not None:
                points.arm()
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the run failed without being killed")
    return os.WTERMSIG(status)


def colours(root: Path) -> Path:
    """Draw a task of three colours."""
    for label, colour in enumerate(((200, 40, 50), (50, 190, 60), (40, 60, 200))):
        (root / str(label)).mkdir(parents=True)
        noise = np.random.default_rng(label).normal(colour, 40, (12, 40, 40, 3)).clip(0, 255).astype(np.uint8)
        for number, pixels in enumerate(noise):
            Image.fromarray(pixels).save(root / str(label) / f"{number}.png")
    return root


def fit(data: Path, out: Path, resume: bool = False) -> None:
    """Train, writing the state after every epoch."""
    keeping.STATE_SECONDS = 0.0
    train_folder(data, out, backbone=BACKBONE, method_config=LORA, train_config=RECIPE, resume=resume)


def spread(points: int, kills: int) -> Iterator[int]:
    """Numbers of points, evenly over all; each once where there are fewer than kills."""
    yield from dict.fromkeys(int(n) for n in np.linspace(1, points, min(kills, points)).round())


def names_of(work: Callable[[], Any], scratch: Path) -> list[str]:
    """The names of all points that `work` passes."""
    log = scratch / "points"
    log.unlink(missing_ok=True)
    in_child(work, Points(log=log))
    return log.read_text().splitlines()


def attack(
    verb: str, kills: int, scratch: Path, prepare: Callable[[], None], work: Callable[[], Any], check: Callable[[], str]
) -> tuple[int, list[str]]:
    """Kill `work` at points spread over all it passes; returns how often, and what was lost."""
    prepare()
    names, lost = names_of(work, scratch), []
    numbers = list(spread(len(names), kills))
    for number in numbers:
        prepare()
        if in_child(work, Points(number)) != signal.SIGKILL:
            raise SystemExit(f"{verb}: point {number} was not reached")
        try:
            outcome = check()
        except Exception as error:
            outcome = f"LOST: {error}"
            lost.append(f"{verb}, {names[number - 1]}: {error}")
        print(f"{verb:5} killed at point {number:3} of {len(names)}, {names[number - 1]:18} {outcome}", flush=True)
    return len(numbers), lost


def attack_train(kills: int, scratch: Path) -> tuple[int, list[str]]:
    """Kill training; what is left must load, and the resumed run must end in the same weights."""
    data, whole, out = colours(scratch / "data"), scratch / "whole", scratch / "run" / "adapter"
    in_child(lambda: fit(data, whole), None)
    expected = (whole / TENSORS).read_bytes()

    def prepare() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)

    def check() -> str:
        adapter, state = out.is_dir(), state_file(out).is_file()
        if adapter:
            visgraft.load(out)
        if state:
            with safetensors.safe_open(state_file(out), framework="pt") as file:
                [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  (not a mapping)
        if not adapter or state:
            in_child(lambda: fit(data, out, resume=True), None)
        assert (out / TENSORS).read_bytes() == expected, "the weights differ from those of a run without a kill"
        return f"adapter {'whole' if adapter else 'absent'}, state {'whole' if state else 'absent'}, resumed alike"

    return attack("train", kills, scratch, prepare, lambda: fit(data, out), check)


def attack_save(kills: int, scratch: Path) -> tuple[int, list[str]]:
    """Kill `save` over an earlier adapter; the old or the new one must be there in whole."""
    model = visgraft.attach(visgraft.create_backbone(BACKBONE, 3), LORA)
    old, new, out = scratch / "old", scratch / "new", scratch / "saved"
    visgraft.save(model, old)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    visgraft.save(model, new)
    allowed = {(path / TENSORS).read_bytes(): path.name for path in (old, new)}

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)

    def check() -> str:
        visgraft.load(out)
        return f"{allowed[(out / TENSORS).read_bytes()]} adapter, whole"

    return attack("save", kills, scratch, prepare, lambda: visgraft.save(model, out), check)


def attack_merge(kills: int, scratch: Path) -> tuple[int, list[str]]:
    """Kill `merge` over an earlier merged model; timm must open the old or the new one."""
    old, new, out = scratch / "merged-old", scratch / "merged-new", scratch / "merged"
    for adapter, target in ((scratch / "old", old), (scratch / "new", new)):
        merge_adapter(adapter, target)
    allowed = {(path / "model.safetensors").read_bytes(): path.name for path in (old, new)}

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)

    def check() -> str:
        reopen_plain(out)
        return f"{allowed[(out / 'model.safetensors').read_bytes()]}, whole"

    return attack("merge", kills, scratch, prepare, lambda: merge_adapter(scratch / "new", out), check)


def main() -> None:
    """Attack the three verbs and print what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for each verb")
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        found = [work(kills, Path(folder)) for work in (attack_train, attack_save, attack_merge)]
    lost = [text for _, texts in found for text in texts]
    counts = ", ".join(f"{verb} {count}" for verb, (count, _) in zip(("train", "save", "merge"), found, strict=True))
    print(f"kills: {counts}; files lost or damaged: {len(lost)}")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
