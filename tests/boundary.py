"""Files, models and refusals for the tests of what does not fit together at the Python boundary."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import vit
from torch import nn

import visgraft
from visgraft import Example, Images, LoRAConfig, TrainConfig, VisgraftError

CLASSES, SIZE, OTHER = 3, 16, 24  # pixels
CONFIG = TrainConfig(epochs=1, warmup_epochs=0.0, batch_size=4, precision="fp32")
HALF = (0.5,) * 3
SIZES = (f"{OTHER} × {OTHER} pixels", f"takes {SIZE} × {SIZE}", f"img_size={OTHER}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, generator = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded from now on."""
    found: list[Path] = []
    for name in ("visgraft.data.images", "visgraft.serve.decoding"):
        module: Any = importlib.import_module(name)
        real = module.open_image
        monkeypatch.setattr(
            module,
            "open_image",
            lambda what, colour, real=real: (found.append(getattr(what, "path", what)), real(what, colour))[1],
        )
    return found


def plain(outputs: int = CLASSES, size: int = SIZE, **changes: Any) -> Any:
    return vit(num_classes=outputs, img_size=size, **changes)


def adapted(outputs: int = CLASSES, size: int = SIZE, **changes: Any) -> Any:
    return visgraft.attach(plain(outputs, size, **changes), LoRAConfig())


def read(files: list[Path], size: int = SIZE, outputs: int = 0, cache: str = "none") -> Images:
    """Images of three classes, decoded only when something asks for their pixels."""
    examples = [Example(path, number % CLASSES) for number, path in enumerate(files)]
    return visgraft.load_images(examples, visgraft.model_data_config(plain(size=size)), outputs=outputs, cache=cache)


def several(images: Images, classes: int = CLASSES) -> Images:
    """The images with labels as where each may have several classes."""
    return replace(images, labels=nn.functional.one_hot(images.labels, classes).float())


def state(model: nn.Module) -> tuple[Any, ...]:
    """What must be the same after a refusal."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return tensors, hooks, flags, {name: module.training for name, module in model.named_modules()}


@contextmanager
def refused(kind: type[VisgraftError], *words: str, model: nn.Module | None = None) -> Iterator[None]:
    """The block ends in one line of exactly this kind that has these words and a remedy; the model is as it was."""
    before = None if model is None else state(model)
    with pytest.raises(VisgraftError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.count("\n") == 0 and "; " in message
    assert all(word in message for word in words), message
    if model is not None and before is not None:
        after = state(model)
        assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
        assert after[1:] == before[1:]


def never(*arguments: Any) -> None:
    raise AssertionError("a step was made")


def train(model: nn.Module, images: Any, val: Images | None = None) -> visgraft.Training:
    return visgraft.train(model, images, CONFIG, val, never)
