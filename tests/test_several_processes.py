"""One training in several processes, or in pieces one after another, gives the weights of one process."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from PIL import Image
from several import CASES, RECIPE, RESUMED, Case, method, pictures, run, start
from support import CLASSES, TINY, vit
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from visgraft import FullConfig, TrainConfig, VisgraftError, attach
from visgraft.adapters.directory import TENSORS
from visgraft.cli.app import build
from visgraft.executors.distributed import batches_of, rows_of_shares, shares
from visgraft.measure.measuring import eval_adapter
from visgraft.training.loop import train
from visgraft.training.pieces import pieces_of
from visgraft.training.resume import SUFFIX, read_state, write_state

HERE = Path(__file__).parent
FIGURES = ("figures", "answers")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the other processes have: with more threads, sums are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def launched(number: int, *command: object, **more: Any) -> list[subprocess.Popen[bytes]]:
    """Start a command as several processes, as a launcher does without one."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    paths = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    everyone = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in range(number)]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env=everyone | {k: str(v) for k, v in rank.items()}, **more
        )
        for rank in ranks
    ]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Tensor]], list[dict[str, str]], Path]:
    """What each of two processes held after all cases, what it said, and where their files are."""
    folder = tmp_path_factory.mktemp("together")
    write_state(folder / "of-one", run(CASES[RESUMED])[1][0], {})
    processes = launched(2, HERE / "several.py", folder)
    assert [process.wait(300) for process in processes] == [0, 0]
    tensors = [safetensors.torch.load_file(folder / f"{rank}.safetensors") for rank in range(2)]
    return tensors, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], folder


GRADIENTS: dict[str, list[tuple[Tensor, Tensor]]] = {}


@functools.cache
def single(name: str) -> dict[str, Tensor]:
    """What one process holds after a case; `GRADIENTS` then has the last gradients."""
    last = dict[Tensor, Tensor]()

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            last[p] = p.grad.detach().clone()

    hook = register_optimizer_step_pre_hook(keep)
    found = run(CASES[name])[0]
    hook.remove()
    GRADIENTS[name] = [(p.detach(), gradient) for p, gradient in last.items()]
    return found


def decided(name: str, tensor: Tensor) -> Tensor:
    """The values of a tensor that the loss depends on.

    It does not on the bias of attention's keys, which softmax takes out again: its gradient is rounding and no more, of
    which AdamW makes whole steps.
    """
    if not name.endswith(("qkv.bias", "qkv.shift")):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat((query, value))


FAINT = 1e-7
"""A gradient below this is ten of AdamW's epsilon, and a rounding error of float32 beside the usual ones of 1e-3."""


def faint(case: Case, tensor: Tensor) -> Tensor:
    """Where the last gradient of a trained tensor was next to nothing, but not nothing."""
    last = next((g for p, g in last_gradients(case) if torch.equal(p, tensor.float())), None)
    return torch.zeros_like(tensor, dtype=torch.bool) if last is None else (last != 0) & (last.abs() < FAINT)


def last_gradients(case: Case) -> list[tuple[Tensor, Tensor]]:
    """What the parameters were after a training, and what their last gradients had been."""
    name = next(name for name, one in CASES.items() if one is case)
    single(name)
    return GRADIENTS[name]


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> None:
    """Compare what two trainings hold.

    Sums over a batch are rounded in another order: by some 1e-7 of a gradient in float32 and some 1e-3 in bfloat16,
    which has 8 bits. AdamW divides a gradient by its size, so a step of `lr` moves by about as much of `lr`, but by
    more where a gradient is small beside those that it is summed of. So in float32 no weight is further away than a
    thousandth of a step, but for those whose gradient was next to nothing (`FAINT`), on which AdamW's epsilon acts; in
    bfloat16 all weights together move by one part in twenty otherwise at most.
    """
    assert found.keys() == expected.keys()
    before = {name: tensor.float() for name, tensor in start(case).state_dict().items() if name in expected}
    exact = case.recipe.precision == "fp32"
    pairs = {name: [decided(name, t[name].float()) for t in (found, expected)] for name in expected}
    for name in FIGURES:
        assert torch.allclose(*pairs.pop(name), rtol=0, atol=1e-6 if exact else 5e-3), name
    if exact:
        far = {
            name: ((one - other).abs() * decided(name, ~faint(case, expected[name]))).max().item()
            for name, (one, other) in pairs.items()
        }
        assert max(far.values()) <= 1e-3 * case.recipe.lr, far
    apart = sum((one - other).square().sum().item() for one, other in pairs.values())
    moved = sum((one - decided(name, before[name])).square().sum().item() for name, (one, _) in pairs.items())
    assert moved > 0 and apart <= (1e-4 if exact else 0.05) ** 2 * moved


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_weights_of_one(name: str, together: Any) -> None:
    tensors, _, _ = together
    found = [{k.removeprefix(f"{name}/"): v for k, v in t.items() if k.startswith(f"{name}/")} for t in tensors]
    assert found[0] and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    check_equal(found[0], single(name), CASES[name])


def test_a_run_goes_on_in_another_number_of_processes_and_in_pieces(together: Any) -> None:
    tensors, _, folder = together
    case, whole = CASES[RESUMED], single(RESUMED)
    for name in ("resumed", "accumulated"):
        check_equal(
            {k.removeprefix(f"{name}/"): v for k, v in tensors[0].items() if k.startswith(f"{name}/")}, whole, case
        )
    check_equal(run(case, resume=read_state(folder / "of-several", {}))[0], whole, case)


def test_an_error_in_one_process_ends_all_with_one_line(together: Any) -> None:
    _, said, _ = together
    assert [one["failed"] for one in said] == ["process 1 has no more room", "None"]
    assert all("shared by 2 processes" in one["crowded"] for one in said)


@pytest.mark.parametrize("name", CASES)
def test_pieces_one_after_another_give_the_weights_of_the_whole(name: str) -> None:
    case = CASES[name]
    check_equal(run(replace(case, options={**case.options, "gradient_accumulation": 3}))[0], single(name), case)


@pytest.mark.parametrize("name", ["dropout", "drop_path"])
def test_pieces_go_with_checkpointing(name: str) -> None:
    case = CASES[name]
    more = {"gradient_accumulation": 2, "grad_checkpointing": True}
    check_equal(run(replace(case, options={**case.options, **more}))[0], single(name), case)


def test_everything_is_shared_out_once() -> None:
    for number in (0, 1, 2, 5, 64, 65):
        for parts in (1, 2, 3, 7):
            found = shares(number, parts)
            assert [i for part in found for i in range(number)[part]] == list(range(number)) and len(found) == parts
            assert (
                max(len(range(number)[part]) for part in found) - min(len(range(number)[part]) for part in found) <= 1
            )
    assert batches_of(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)] and batches_of(0, 2) == []
    assert rows_of_shares(batches_of(5, 2)) == [slice(0, 5)]


def test_pieces_hold_each_image_once_and_what_it_is_mixed_with() -> None:
    batch = torch.tensor([7, 3, 9, 1, 4])
    [whole] = pieces_of(batch, TrainConfig(mixup=0.2))
    assert whole.rows is None and torch.equal(whole.loaded, batch)
    first, second = pieces_of(batch, TrainConfig(gradient_accumulation=2, mixup=0.2))
    assert (first.rows, first.loaded.tolist()) == ((0, 2, 5), [4, 7, 3])
    assert (second.rows, second.loaded.tolist()) == ((2, 5, 5), [3, 9, 1, 4])
    assert [p.loaded.tolist() for p in pieces_of(batch[:2], TrainConfig(gradient_accumulation=3))] == [[7], [3]]


def test_pieces_that_cannot_be_are_refused_in_one_line() -> None:
    for pieces, text in ((0, "must be above 0"), (33, "no more pieces than images")):
        with pytest.raises(VisgraftError, match=text):
            TrainConfig(gradient_accumulation=pieces)
    recipe = replace(RECIPE, gradient_accumulation=2)
    with_norm: Any = vit()
    with_norm.head = nn.Sequential(nn.BatchNorm1d(TINY["embed_dim"]), nn.Linear(TINY["embed_dim"], CLASSES))
    for model, config, text in (
        (with_norm, method("lora"), r"head\.0 trains on statistics of the whole batch"),
        (vit(attn_drop_rate=0.1), FullConfig(), r"attn_drop \(Dropout\) draws in a way of its own"),
        (vit(patch_drop_rate=0.1), FullConfig(), r"patch_drop \(\w+\) draws in a way of its own"),
    ):
        images = pictures(20)
        with pytest.raises(VisgraftError, match=text):
            train(attach(model, config, images.batches()), images, recipe)


def test_results_from_before_the_option_keep_their_keys() -> None:
    assert "gradient_accumulation" not in TrainConfig().to_dict()
    assert TrainConfig.from_dict(TrainConfig(gradient_accumulation=2).to_dict()).gradient_accumulation == 2


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """42 images of three classes."""
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent / "src"))
    draws = np.random.default_rng(0)
    for number in range(42):
        folder = tmp_path / "photos" / f"c{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((draws.integers(0, 100, (40, 40, 3)) + 50 * (number % 3)).astype(np.uint8)).save(
            folder / f"{number}.png"
        )
    return tmp_path / "photos"


BACKBONE = ("--backbone", "test_vit", "--weights", "none", "--image-size", "32", "--precision", "fp32")
TRAIN = (*BACKBONE, "--method", "lora", "--batch-size", "8")


def launch(number: int, *words: object) -> subprocess.Popen[str]:
    """Start the real command line; where there are no GPUs, this launcher starts several processes only if told so."""
    options = f"--multi_gpu --num_machines 1 --num_processes {number} --main_process_port 0 --mixed_precision no"
    command = ["-m", "accelerate.commands.launch", *options.split(), "--dynamo_backend", "no", "-m", "visgraft"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command, *map(str, words)], **pipes)


def said(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """Standard output, and the lines of errors, of which the launcher's own are none."""
    out, err = process.communicate(timeout=300)
    return out, [line for line in err.splitlines() if line.startswith("error: ")]


def test_accelerate_launch_trains_as_the_command_does(photos: Path, tmp_path: Path) -> None:
    words = ["train", photos, *TRAIN, "--epochs", "2", "--json"]
    process = launch(2, *words, "--out", tmp_path / "two")
    out, errors = said(process)
    assert (process.returncode, errors) == (0, [])
    figures = json.loads(out)
    typed = [*map(str, words), "--out", str(tmp_path / "one")]
    build(typed)(typed, standalone_mode=False)
    one, two = (safetensors.torch.load_file(tmp_path / name / TENSORS) for name in ("one", "two"))
    assert one.keys() == two.keys() and all((one[key] - two[key]).abs().max() < 1e-5 for key in one)
    assert figures["images"] == 6 and not (tmp_path / f"two{SUFFIX}").exists()


def until_trained(process: subprocess.Popen[str]) -> None:
    """Wait until some epochs are over."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch"):
            time.sleep(1)
            return


@pytest.mark.long
@pytest.mark.parametrize("how", ["killed", "first killed", "interrupted"])
def test_a_process_that_is_killed_or_interrupted_ends_all_and_leaves_the_state(
    how: str, photos: Path, tmp_path: Path
) -> None:
    process = launch(2, "train", photos, *TRAIN, "--epochs", 3000, "--out", tmp_path / "out")
    until_trained(process)
    children = sorted(child.pid for child in psutil.Process(process.pid).children())
    if how == "interrupted":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(children[0 if how == "first killed" else 1], signal.SIGKILL)
    begin = time.monotonic()
    _, errors = said(process)
    assert process.returncode and time.monotonic() - begin < 60
    assert not any(psutil.pid_exists(child) for child in children)
    if how != "first killed":
        assert len(errors) == 1 and "give the same command with --resume to go on" in errors[0]
        assert (tmp_path / f"out{SUFFIX}").is_file() and (tmp_path / "out").is_dir()


@pytest.mark.long
def test_three_processes_measure_and_cross_validate(photos: Path, tmp_path: Path) -> None:
    words = ["train", photos, *TRAIN, "--epochs", 2, "--json", "--folds", 2, "--repeats", 1]
    out, errors = said(launch(3, *words, "--out", tmp_path / "out"))
    assert errors == [] and 0 <= json.loads(out)["cross_validation"]["figure"] <= 1
    out, errors = said(launch(3, "eval", tmp_path / "out", photos, "--json"))
    expected = eval_adapter(tmp_path / "out", photos)
    assert errors == [] and all(json.loads(out)[name] == expected[name] for name in ("top1", "images", "macro_f1"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["bench", "run", "offline"], "side by side with --on"),
        (["train", "PHOTOS", "--out", "OUT", "--dry-run"], "--dry-run forecasts a training, in one process"),
        (["train", "PHOTOS", "--out", "OUT", "--method", "auto"], "--method auto chooses within a time"),
        (["train", "PHOTOS", "--out", "OUT", "--flop"], "No such option"),
        (["train", "PHOTOS", "--out", "OUT", *BACKBONE, "--batch-size", "1"], "shared by 2 processes"),
        (["train", "PHOTOS", "--out", "OUT", *BACKBONE, "--method", "full", "--lr", "1e30"], "no longer finite"),
    ],
)
def test_what_several_processes_cannot_do_is_one_line(
    words: list[str], text: str, photos: Path, tmp_path: Path
) -> None:
    process = launch(2, *(word.replace("PHOTOS", str(photos)).replace("OUT", str(tmp_path / "out")) for word in words))
    out, errors = said(process)
    assert process.returncode and not out and len(errors) == 1 and text in errors[0]
