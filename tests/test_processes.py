"""Images in other processes: the workers of torch's DataLoader."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import copy
import pickle
from pathlib import Path

import pytest
import torch
from boundary import SIZE, files, plain, read, refused
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

import visgraft
from visgraft import DataError, Example, Images


def test_spawned_workers_read_images_from_every_cache(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path))
    caches = {cache: read(files, cache=cache) for cache in ("ram", "disk", "none")}
    assert {type(images.pixels).__name__ for images in caches.values()} == {"Tensor", "Mapped", "Decoded"}
    for images in caches.values():
        again = pickle.loads(pickle.dumps(images))
        assert torch.equal(again.pixels[:], caches["ram"].pixels[:]) and torch.equal(again.labels, images.labels)
        assert (again.paths, again.mean) == (images.paths, images.mean)
    together = ConcatDataset(list(caches.values()))  # type: ignore[arg-type]
    found = list(DataLoader(together, 6, num_workers=2, multiprocessing_context="spawn"))
    x, y = next(iter(caches["ram"].batches()))
    assert len(found) == 3
    assert all(torch.equal(images, x) and torch.equal(labels, y) for images, labels in found)


class Pairs(Dataset[Tensor]):
    """Two images at a time, which the cache `none` decodes in threads."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images) // 2

    def __getitem__(self, number: int) -> Tensor:
        return self.images.pixels[2 * number : 2 * number + 2]


def test_forked_workers_do_not_wait_for_threads_that_the_fork_left_behind(files: list[Path]) -> None:
    images = read(files)
    expected = images.pixels[:]  # starts the threads
    found = list(DataLoader(Pairs(images), None, num_workers=1, multiprocessing_context="fork", timeout=30))
    assert torch.equal(torch.cat(found), expected)


def test_what_another_process_cannot_be_given_is_one_line(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = files[0].read_bytes()
    examples = [Example(Path("row 1"), 0, content=lambda: content)]
    facts = visgraft.model_data_config(plain())
    with refused(DataError, "cache='none' cannot be handed to another process", "cache='ram' or cache='disk'"):
        pickle.dumps(visgraft.load_images(examples, facts, cache="none"))
    assert len(pickle.loads(pickle.dumps(visgraft.load_images(examples, facts)))) == 1
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path))
    packed = pickle.dumps(visgraft.load_images(examples, facts, cache="disk"))
    assert copy.deepcopy(pickle.loads(packed)).pixels.shape == (1, 3, SIZE, SIZE)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with refused(DataError, "no longer in the image cache", "load the images again"):
        pickle.loads(packed)
