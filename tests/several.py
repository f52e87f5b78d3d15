"""Trainings that one process and several do alike: run by `test_several_processes.py`, and by itself in processes."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from support import CLASSES, vit
from torch import Tensor

from visgraft import Epoch, FullConfig, Images, LinearConfig, MethodConfig, TrainConfig, VisgraftError
from visgraft.adapters.directory import adapter_tensors
from visgraft.core.attach import attach
from visgraft.executors import distributed
from visgraft.measure.evaluation import evaluate
from visgraft.methods import get_method
from visgraft.training.loop import train
from visgraft.training.resume import TrainState, read_state, write_state

RECIPE = TrainConfig(epochs=2, warmup_epochs=0.5, batch_size=8, lr=5e-3, precision="fp32")
AUGMENTED = {"flip": True, "rand_augment": "rand-m9-mstd0.5-inc1", "crop_scale": 0.5}


def method(name: str, **options: Any) -> MethodConfig:
    return get_method(name).Config(**options)


@dataclass(frozen=True)
class Case:
    """A training on `count` images of the tiny ViT's `kind`; `options` are those of training."""

    config: MethodConfig
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "plain"
    count: int = 37  # no multiple of the batch
    several: bool = False

    @property
    def recipe(self) -> TrainConfig:
        return replace(RECIPE, **self.options)


CASES = {
    "augmented": Case(method("lora"), AUGMENTED),
    "dropout": Case(method("alore"), {"class_weights": "balanced", "label_smoothing": 0.1, "batch_size": 9}),
    "plain dropout": Case(method("lora", dropout=0.3), {"sampler": "balanced"}),
    "drop_path": Case(method("adaptformer"), {"drop_path": 0.2, "mixup": 0.4, "cutmix": 1.0}, "drop_path"),
    "mixed": Case(method("ssf"), {"mixup": 0.4, "class_weights": "sqrt", **AUGMENTED}),
    "multi-label": Case(method("sct"), {"class_weights": "balanced"}, several=True),
    "features": Case(LinearConfig(), {"class_weights": "sqrt"}, count=150),
    "prefix": Case(method("sct", last_blocks=1), {"class_weights": "balanced"}, count=150),
    "cached views": Case(method("alore", last_blocks=1), {"cached_views": 2, **AUGMENTED}),
    "full": Case(FullConfig(), {"weight_decay": 0.1}),
    "few images": Case(method("lora"), count=2),
    "bf16": Case(method("alore"), {"precision": "bf16"}),
    "bf16 prefix": Case(method("sct", last_blocks=2), {"precision": "bf16"}),
}


RESUMED = "dropout"


def pictures(count: int, several: bool = False, seed: int = 0) -> Images:
    """Noise with the class in its brightness; class 0 is twice as frequent as the others."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) % (CLASSES + 1)) % CLASSES
    noise = torch.randint(0, 100, (count, 3, 16, 16), generator=generator)
    pixels = (noise + 30 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    many = (torch.rand(count, CLASSES, generator=generator) < 0.4).float()
    return Images(pixels, many if several else labels, (0.5,) * 3, (0.5,) * 3, outputs=CLASSES)


def start(case: Case) -> Any:
    """The model of a case, before it trains."""
    torch.manual_seed(3)
    return attach(vit(case.kind), case.config, pictures(case.count, case.several).batches())


def run(case: Case, resume: TrainState | None = None) -> tuple[dict[str, Tensor], list[TrainState]]:
    """What a case's adapter holds after its training, with the validation's figures, and the states of its epochs."""
    model, states = start(case), list[TrainState]()
    images, val = pictures(case.count, case.several), pictures(70, case.several, 1)
    train(model, images, case.recipe, val, resume=resume, on_state=states.append)
    last = states[-1].history[-1]
    figures = torch.tensor([last.loss, last.top1 or 0.0, last.val_loss, last.val_top1 or last.val_map or 0.0])
    answers = evaluate(model, val, "fp32").probabilities
    return {**adapter_tensors(model), "figures": figures, "answers": answers}, states


def fail_in_one(case: Case, rank: int) -> None:
    """Train until process 1 has an error of its own."""

    def progress(epoch: Epoch) -> None:
        if rank == 1:
            raise VisgraftError("process 1 has no more room")

    train(start(case), pictures(case.count), case.recipe, on_progress=progress)


def main(out: Path) -> None:
    """Run all cases together with other processes, and write what this one holds in the end."""
    torch.set_num_threads(1)
    distributed.join()
    rank, found = distributed.rank(), dict[str, Tensor]()
    for name, case in CASES.items():
        tensors, states = run(case)
        found |= {f"{name}/{key}": value for key, value in tensors.items()}
        if name == RESUMED and rank == 0:
            write_state(out / "of-several", states[0], {})
    case = CASES[RESUMED]
    resumed, _ = run(case, resume=read_state(out / "of-one", {}))
    accumulated, _ = run(replace(case, options={**case.options, "gradient_accumulation": 2}))
    for name, tensors in (("resumed", resumed), ("accumulated", accumulated)):
        found |= {f"{name}/{key}": value for key, value in tensors.items()}
    safetensors.torch.save_file(found, out / f"{rank}.safetensors")
    refused = {"crowded": "", "failed": ""}
    try:
        run(replace(case, options={"batch_size": distributed.count() - 1}))
    except VisgraftError as error:
        refused["crowded"] = str(error)
    try:
        fail_in_one(case, rank)
    except VisgraftError as error:
        refused["failed"] = str(distributed.words_at_the_end(str(error), isinstance(error, distributed.ProcessLost)))
    (out / f"{rank}.json").write_text(json.dumps(refused))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
