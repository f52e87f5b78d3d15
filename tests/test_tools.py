"""What others do with an attached model: threads, tracers, exporters, wrappers, and people with loops of their own."""

import copy
import io
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from support import CLASSES, CONFIGS, DEFAULTS, batches, enliven, family, fitted, images, logits, shallow
from test_laws import OBEYING, adapted, pictures
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from visgraft import (
    Adapted,
    Images,
    LoRAConfig,
    TrainConfig,
    attach,
    count_parameters,
    detach,
    evaluate,
    load,
    merge,
    model_data_config,
    predict,
    save,
    train,
)
from visgraft.adapters.directory import CONFIG, TENSORS
from visgraft.adapters.warm_start import start_from
from visgraft.core.attached import get_attached
from visgraft.core.taps import Kept
from visgraft.core.tensors import CHILD
from visgraft.errors import AdapterError, VisgraftError

THREADS, FORWARDS, DIFFERENT = 8, 15, 5  # a `Kept` that threads share was caught by 5 forwards, 5 times of 5


TRACED = ("sct-0", "alore-0", "lora-0", "ssf-0", "fact-0", "dora-0", "vpt_deep-0")


def rarely(pairs: list[tuple[str, str]], *kinds: str) -> list[Any]:
    """Some methods on one family and one method on some in each run, the other pairs with `-m long`."""
    return [
        pair
        if (pair[1] == "plain" and pair[0] in TRACED) or (pair[0] == "alore-0" and pair[1] in kinds)
        else pytest.param(*pair, marks=pytest.mark.long)
        for pair in pairs
    ]


PAIRS = [(name, kind) for name, kind in OBEYING if name in DEFAULTS or kind == "plain"]


@contextmanager
def hurried_threads() -> Iterator[None]:
    """Let threads take turns so often that none gets through a forward alone."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(answer: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> list[list[Tensor]]:
    """Let each of several threads answer the inputs in turn, each beginning with another: {thread: answers}."""

    def work(number: int) -> list[Tensor]:
        with torch.no_grad():
            return [answer(inputs[(number + i) % len(inputs)]) for i in range(FORWARDS)]

    with hurried_threads(), ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(THREADS)))


@pytest.mark.parametrize(("name", "kind"), rarely(PAIRS, "swin", "convnext", "mixer", "beit"), ids=lambda value: value)
def test_18_eight_threads_answer_as_one(name: str, kind: str) -> None:
    model = adapted(name, kind)
    inputs = [pictures(kind, 1 + i % 2, seed=i) for i in range(DIFFERENT)]
    alone = [logits(model, x) for x in inputs]
    found = in_threads(model, inputs)
    wrong = sum(
        not torch.equal(answer, alone[(number + i) % DIFFERENT])
        for number, answers in enumerate(found)
        for i, answer in enumerate(answers)
    )
    assert wrong == 0, f"{wrong} of {THREADS * FORWARDS} answers"
    assert held_by(model) == []


def held_by(model: nn.Module) -> list[Kept]:
    """What hooks of this thread still keep."""
    return [kept for kept in get_attached(model).taps.kept if kept.tensor is not None]


@pytest.mark.parametrize("name", ["sct-0", "lora-0", "alore-0", "adaptformer-0", "fact-0"])
def test_nothing_is_kept_after_a_forward_nor_after_one_that_fails(name: str) -> None:
    model, x = adapted(name, "plain"), images(2)
    before = logits(model, x)
    assert get_attached(model).taps.kept and held_by(model) == []

    def fail(*_: Any) -> None:
        raise RuntimeError("in between")

    for path in ("blocks.1.mlp.fc1", "blocks.1.attn.proj", "blocks.1.norm2"):
        handle = model.get_submodule(path).register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in between"):
            model(x)
        handle.remove()
        assert held_by(model) == [], path
        assert torch.equal(logits(model, x), before)


@pytest.mark.parametrize("training", [False, True])
def test_predictions_and_merges_from_several_threads_are_those_of_one(training: bool, tmp_path: Path) -> None:
    generator, files = np.random.default_rng(0), [tmp_path / f"{i}.png" for i in range(12)]
    for file in files:
        Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(file)
    model = adapted("alore-0", "plain").train(training)
    ready = Adapted.of(model, classes=list("abcde"))
    alone, (plain, _) = predict(ready, files, top=5), merge(model, images(4))

    def work(number: int) -> tuple[Any, nn.Module]:
        return predict(ready, files, top=5), merge(model, images(4))[0]

    with hurried_threads(), ThreadPoolExecutor(4) as pool:
        for answers, merged in pool.map(work, range(4)):
            assert answers == alone
            assert all(
                torch.equal(ours, theirs) for ours, theirs in zip(merged.parameters(), plain.parameters(), strict=True)
            )
    assert model.training is training and not model.blocks[0].training


def export(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=True)


@pytest.mark.parametrize(("name", "kind"), rarely(PAIRS, "swin", "convnext", "mixer", "beit"), ids=lambda value: value)
def test_19_it_exports_with_any_number_of_images(name: str, kind: str) -> None:
    torch._dynamo.reset()
    model = shallow(name, kind).double()
    program = export(model, pictures(kind, 4).double()).module()
    for count in (1, 3, 7):
        x = pictures(kind, count, seed=count).double()
        found, expected = logits(program, x), logits(model, x)
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("name", ["sct-0", "lora-0", "alore-0", "fact-0", "repadapter-0", "arc-0"])
def test_a_trace_is_saved_and_answers_the_same(name: str) -> None:
    model, x, file = adapted(name, "plain"), images(3), io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, images(2)), file)
    file.seek(0)
    torch.testing.assert_close(logits(torch.jit.load(file), x), logits(model, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sct-0", "lora-0", "alore-0", "ssf-0"])
def test_functional_gradients_are_those_of_autograd(name: str) -> None:
    model, x = adapted(name, "plain").double(), images(3).double()
    trained = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    found = torch.func.grad(lambda tensors: torch.func.functional_call(model, tensors, (x,)).square().sum())(trained)
    model(x).square().sum().backward()
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[key], p.grad)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def fabric(model: nn.Module) -> nn.Module:
    """As Lightning's Fabric wraps a module."""

    class _FabricModule(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._forward_module, self._original_module = inner, inner

        def forward(self, x: Tensor) -> Tensor:
            return self._forward_module(x)

    return _FabricModule(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "averaged": AveragedModel,
    "fabric": fabric,
    "twice": lambda model: compiled(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_seen_through_or_refused_by_name(wrap: str, tmp_path: Path) -> None:
    model, x = fitted(CONFIGS["lora-0"]), images(4)
    wrapper = WRAPPERS[wrap](model)
    expected = logits(model, x)
    assert count_parameters(wrapper) == count_parameters(model)
    save(wrapper, tmp_path / "a", classes=list("abcde"))
    assert torch.equal(logits(load(tmp_path / "a", backbone=family("plain")).model, x), expected)
    plain, _ = merge(wrapper, x)
    torch.testing.assert_close(logits(plain, x), expected, atol=1e-4, rtol=1e-4)
    task = Images((x * 40 + 128).clamp(0, 255).to(torch.uint8), torch.tensor([0, 1, 2, 3]), (0.5,) * 3, (0.5,) * 3)
    assert evaluate(wrapper, task, "fp32").images == 4
    for verb in (lambda: attach(wrapper, CONFIGS["sct-0"], batches(size=16)), lambda: detach(wrapper)):
        with pytest.raises(VisgraftError, match=r"wrapper around the model.* the model inside") as caught:
            verb()
        assert type(wrapper).__name__ in str(caught.value)


@pytest.mark.parametrize("wrap", ["compiled", "DataParallel", "fabric"])
def test_training_a_wrapped_model_keeps_the_best_epoch_that_it_reports(wrap: str) -> None:
    pixels = torch.randint(0, 256, (24, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    task = Images(pixels, torch.arange(24) % 3, (0.5,) * 3, (0.5,) * 3)
    config = TrainConfig(epochs=3, warmup_epochs=0.0, batch_size=8, lr=2e-2, select="val", precision="fp32")
    alone = fitted(CONFIGS["lora-0"])
    model = copy.deepcopy(alone)
    expected = train(alone, task, config, task)
    found = train(WRAPPERS[wrap](model), task, config, task)
    assert found.kept_epoch == expected.kept_epoch
    ours, theirs = get_attached(model).stored(), get_attached(alone).stored()
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], atol=1e-5, rtol=1e-4)


def test_a_model_inside_another_is_named() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = fitted(CONFIGS["lora-0"])

    with pytest.raises(VisgraftError, match="nothing is attached to this Task, but to its net; pass that"):
        save(Task(), "nowhere")


def own_loop(model: nn.Module, steps: int = 3) -> None:
    """A user's training loop, which knows nothing of visgraft."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images(6)), torch.arange(6) % 3).backward()
        optimizer.step()
    model.eval()


UNFROZEN = {
    "a norm": ("plain", "norm"),
    "position embeddings": ("plain", "pos_embed"),
    "the class token": ("plain", "cls_token"),
    "a block": ("plain", "blocks.1"),
    "a stage": ("convnext", "stages.3"),
    "a table of biases": ("swin", "layers.0.blocks.0.attn"),
}


def unfreeze(model: nn.Module, path: str) -> None:
    found = [p for name, p in model.named_parameters() if name == path or name.startswith(f"{path}.")]
    assert found
    for parameter in found:
        parameter.requires_grad_(True)


@pytest.mark.parametrize("refrozen", [False, True])
@pytest.mark.parametrize("what", UNFROZEN)
def test_what_a_user_unfreezes_is_stored_counted_and_given_back(what: str, refrozen: bool, tmp_path: Path) -> None:
    kind, path = UNFROZEN[what]
    plain, model, x = family(kind), fitted(CONFIGS["lora-0"], kind), pictures(kind)
    counted = count_parameters(model).adapter
    start = logits(plain, x)
    unfreeze(model, path)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    model(x).square().sum().backward()
    optimizer.step()
    model.eval()
    assert count_parameters(model).adapter > counted
    if refrozen:
        for name, parameter in model.named_parameters():
            if name == path or name.startswith(f"{path}."):
                parameter.requires_grad_(False)
    expected = logits(model, x)
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", backbone=family(kind))
    assert torch.equal(logits(loaded.model, x), expected)
    assert loaded.record.own and all(name == path or name.startswith(f"{path}.") for name in loaded.record.own)
    save(loaded.model, tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b", backbone=family(kind)).model, x), expected)
    assert torch.equal(logits(detach(loaded.model), x), start)
    assert torch.equal(logits(detach(model), x), start)
    other = family(kind)
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if not name.startswith(path) and p.ndim == 2).add_(0.1)
    with pytest.raises(AdapterError, match="another backbone"):
        load(tmp_path / "a", backbone=other)


HEADS = {"plain": "head", "convnext": "head.fc", "swin": "head.fc", "mixer": "head", "deit_distilled": "head"}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("before", [0, CLASSES])
def test_a_head_that_came_later_is_stored_counted_and_taken_off_again(kind: str, before: int, tmp_path: Path) -> None:
    plain, x = family(kind, num_classes=before), pictures(kind)
    start, keys = logits(plain, x), set(plain.state_dict())
    model = attach(family(kind, num_classes=before), CONFIGS["lora-0"])
    model.reset_classifier(3)  # type: ignore[operator]
    enliven(model).eval()
    number = sum(p.numel() for name, p in model.named_parameters() if name.startswith("head"))
    assert count_parameters(model).head == number > 0 or kind in ("convnext", "swin")
    expected = logits(model, x)
    assert expected.shape == (6, 3)
    save(model, tmp_path / "a", classes=["a", "b", "c"])
    loaded = load(tmp_path / "a", backbone=family(kind, num_classes=3))
    assert torch.equal(logits(loaded.model, x), expected)
    detach(model)
    assert set(model.state_dict()) == keys and model.num_classes == before
    assert torch.equal(logits(model, x), start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_backbone_in_another_precision_is_known_again_or_says_so(dtype: torch.dtype, tmp_path: Path) -> None:
    name = str(dtype).removeprefix("torch.")
    model = enliven(attach(family("plain").to(dtype), CONFIGS["lora-0"])).eval()
    save(model, tmp_path / "a")
    same = load(tmp_path / "a", backbone=family("plain").to(dtype))
    assert torch.equal(logits(same.model, images().to(dtype)), logits(model, images().to(dtype)))
    assert same.record.digest_precision == name
    if dtype == torch.float64:
        with pytest.raises(AdapterError, match=r"in float64, but this one is in float32.* pass the backbone in"):
            load(tmp_path / "a", backbone=family("plain"))
        return
    wider = load(tmp_path / "a", backbone=family("plain")).model
    assert next(wider.parameters()).dtype == torch.float32
    torch.testing.assert_close(logits(wider), logits(model.float()), atol=0.5, rtol=0.1)
    save(attach(family("plain"), CONFIGS["lora-0"]), tmp_path / "b")
    with pytest.raises(AdapterError, match=rf"backbone in float32, but this one is in {name}"):
        load(tmp_path / "b", backbone=family("plain").to(dtype))


def test_nothing_of_ours_hangs_on_a_model(tmp_path: Path) -> None:
    model = fitted(CONFIGS["sct-0"])
    save(model, tmp_path / "a")
    for found in (model, load(tmp_path / "a", backbone=family("plain")).model):
        assert not [name for name in vars(found) if "visgraft" in name]
        assert set(found._modules) - set(family("plain")._modules) == {CHILD}
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def test_a_row_of_zeros_has_no_direction_and_stays() -> None:
    plain = family("plain")
    with torch.no_grad():
        plain.blocks[1].attn.qkv.weight[3].zero_()
    expected, model = logits(plain), attach(copy.deepcopy(plain), CONFIGS["dora-0"])
    assert torch.equal(logits(model), expected)
    merge(enliven(model).eval(), images(4))


def task_of(count: int = 24) -> Images:
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Images(pixels, torch.arange(count) % 3, (0.5,) * 3, (0.5,) * 3)


QUICK = TrainConfig(epochs=2, warmup_epochs=0.0, batch_size=8, precision="fp32")


def test_a_state_of_another_training_is_refused_before_anything_is_touched() -> None:
    states: list[Any] = []
    train(fitted(CONFIGS["lora-0"]), task_of(), QUICK, on_state=states.append)
    unfrozen = fitted(CONFIGS["lora-0"])
    unfreeze(unfrozen, "pos_embed")
    narrower = attach(family("plain"), LoRAConfig(rank=2))
    for model in (unfrozen, fitted(CONFIGS["dora-0"]), fitted(CONFIGS["sct-0"]), narrower):
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(VisgraftError, match="state to resume is of another training"):
            train(model, task_of(), replace(QUICK, epochs=3), resume=states[-1])
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(VisgraftError, match="is after epoch 2, past epochs=1"):
        train(fitted(CONFIGS["lora-0"]), task_of(), replace(QUICK, epochs=1), resume=states[-1])


def test_a_loop_that_never_calls_train_is_seen_all_the_same(tmp_path: Path) -> None:
    plain, model = family("plain"), fitted(CONFIGS["lora-0"]).train()
    start = logits(plain)
    model.norm.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(images()).square().sum().backward()
        optimizer.step()
    model.norm.requires_grad_(False)
    model.eval()
    save(model, tmp_path / "a")
    assert torch.equal(logits(load(tmp_path / "a", backbone=plain).model), logits(model))
    assert torch.equal(logits(detach(model)), start)


@pytest.mark.parametrize("name", ["lora-0", "bitfit-0", "full-0"])
def test_what_was_adopted_loads_after_changes_of_precision_and_from_within_a_bf16_training(
    name: str, tmp_path: Path
) -> None:
    model, saved = fitted(CONFIGS[name]), []
    model.norm.requires_grad_(True)
    config = replace(QUICK, precision="bf16")
    train(model, task_of(), config, on_state=lambda state: saved.append(save(model, tmp_path / f"{state.epoch}")))
    assert len(saved) == 2
    for path in saved:
        load(path, backbone=family("plain"))
    save(model.half().float(), tmp_path / "rounded")
    load(tmp_path / "rounded", backbone=family("plain"))


def test_between_epochs_of_a_bf16_training_the_model_is_whole() -> None:
    model, told = fitted(CONFIGS["lora-0"]), []

    def look(_: Any) -> None:
        told.append((evaluate(model, task_of(), "fp32").top1, {p.dtype for p in copy.deepcopy(model).parameters()}))

    train(model, task_of(), replace(QUICK, precision="bf16"), on_state=look)
    assert len(told) == 2 and all(kinds == {torch.float32} for _, kinds in told)


def test_another_thread_answers_rightly_while_a_frozen_prefix_trains() -> None:
    model = attach(family("plain"), LoRAConfig(last_blocks=1))
    x, shapes = images(3), set()
    training: list[Any] = []

    def hammer(_: Any) -> None:
        if not training:
            training.append(pool.submit(ask))

    def ask() -> None:
        with torch.no_grad():
            shapes.update(tuple(model(x).shape) for _ in range(150))

    with hurried_threads(), ThreadPoolExecutor(1) as pool:
        done = train(model, task_of(), replace(QUICK, epochs=20), on_progress=hammer)
        training[0].result()
    assert done.kept_bytes and shapes == {(3, CLASSES)}


def test_a_head_put_back_goes_where_the_model_went() -> None:
    model = fitted(CONFIGS["lora-0"])
    model.reset_classifier(3)
    model.double()
    torch.testing.assert_close(logits(detach(model), images().double()).float(), logits(family("plain")))


def test_figures_of_a_model_in_another_precision_and_training_in_it() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = fitted(CONFIGS["lora-0"]).to(dtype)
        assert evaluate(model, task_of(), "fp32").images == 24
        with pytest.raises(VisgraftError, match=r"model is in .*; call model.float\(\) first"):
            train(model, task_of(), QUICK)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_facts_of_a_wrapped_model_are_those_inside(wrap: str) -> None:
    model = fitted(CONFIGS["lora-0"])
    assert model_data_config(WRAPPERS[wrap](model)) == model_data_config(model)


def test_warm_starts_take_a_head_of_several_layers_whole_and_refuse_damage(tmp_path: Path) -> None:
    def made() -> nn.Module:
        model = family("plain")
        torch.manual_seed(3)
        model.head = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, CLASSES))
        return model  # type: ignore[no-any-return]

    model = enliven(attach(made(), LoRAConfig())).eval()
    save(model, tmp_path / "a", classes=list("abcde"))
    new = made()
    assert start_from(new, tmp_path / "a", LoRAConfig(), list("abcde")) == []
    assert torch.equal(logits(new.eval()), logits(model))
    tensors = safetensors.torch.load_file(tmp_path / "a" / TENSORS)
    key = next(name for name in tensors if name.endswith("down"))
    safetensors.torch.save_file({**tensors, key: tensors[key][:1] * torch.nan}, tmp_path / "a" / TENSORS)
    new = made()
    for _ in range(2):  # the second time, nothing is attached any longer
        with pytest.raises(AdapterError, match="does not fit its config"):
            start_from(new, tmp_path / "a", LoRAConfig(), list("abcde"))


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "parameters": ({"parameters": None}, "parameters is None"),
    "versions": ({"versions": [1]}, "versions is"),
    "own": ({"backbone": {"own": [["a"]]}}, "own is"),
    "metrics": ({"record": {"metrics": 5}}, "record.metrics is 5"),
    "history": ({"record": {"history": None}}, "record.history is None"),
    "precision": ({"record": {"precision": "x"}}, "precision is 'x'"),
    "background": ({"record": {"data": {"background": 5}}}, "background is 5"),
    "classes": ({"classes": [1, 2, 3, 4, 5]}, "the classes are"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_hand_edited_config_is_refused_in_one_line(edit: str, tmp_path: Path) -> None:
    save(fitted(CONFIGS["lora-0"]), tmp_path / "a", classes=list("abcde"))
    file = tmp_path / "a" / CONFIG
    config, (changes, said) = json.loads(file.read_text()), EDITS[edit]
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=said) as caught:
        load(tmp_path / "a", backbone=family("plain"))
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
