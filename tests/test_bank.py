"""The bank: law 17, a mixed batch equals separate runs, whatever the adapters are."""

import copy
import dataclasses
import functools
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from banks import TOLERANCE, answers, difference, held_to, trained
from PIL import Image
from support import ALL_FAMILIES, CONFIGS, PAIRS, enliven, family, fitted, images, logits, refused, size_of, vit
from test_laws import OBEYING, in_turn
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import visgraft
from visgraft import Adapted, Bank, save
from visgraft.bank.trees import MixedTree
from visgraft.core.attached import get_attached
from visgraft.core.finding import find_sites
from visgraft.errors import AdapterError, DataError, VisgraftError

CANNOT_MIX = ("partial-0", "full-0")


@functools.cache
def bank_of(kind: str) -> tuple[Bank, dict[str, Any]]:
    """A bank with a LoRA, or where that has no place a BitFit, to mix others with."""
    other = "bitfit-0" if refused("lora-0", kind) else "lora-0"
    model = trained(other, kind, seed=7, outputs=3)
    bank = Bank(family(kind))
    bank.add("other", model)
    return bank, {"other": model}


@in_turn(OBEYING)
def test_17_a_mixed_batch_equals_separate_runs(name: str, kind: str) -> None:
    bank, models = bank_of(kind)
    here = {"a": trained(name, kind, seed=1), "b": trained(name, kind, seed=2, outputs=7), **models}
    for key in ("a", "b"):
        bank.add(key, here[key], replace=True)
    x = images(6, size=size_of(kind))
    if not CONFIGS[name].head_only:
        assert difference(logits(here["a"], x[:1])[0], logits(with_head_of(here["a"], here["b"]), x[:1])[0]) > 1e-4
    held_to(bank, here, x[:5], ["a", "b", "other", "b", "a"])
    held_to(bank, here, x[:4], ["b", "a", "a", "b"])
    # Without flags, because torch chooses how to multiply by whether a weight requires a gradient.
    one = logits(here["b"].requires_grad_(False), x)
    assert torch.equal(torch.stack(answers(bank, x, ["b"] * 6)), one), "one adapter is as attached"


def with_head_of(head: Any, model: Any) -> Any:
    """The model with the head of another, so that only the rest differs."""
    model = copy.deepcopy(model)
    model.reset_classifier(5)
    state = {k: v for k, v in head.state_dict().items() if k.startswith(tuple(get_attached(head).head))}
    model.load_state_dict(state, strict=False)
    return model


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "plain" else pytest.mark.long) for k in ALL_FAMILIES]
)
def test_17_all_configurations_in_one_batch(kind: str) -> None:
    bank, models = Bank(family(kind)), {}
    for number, name in enumerate(n for n, k in PAIRS if k == kind and not refused(n, k)):
        models[name] = trained(name, kind, seed=number, outputs=2 + number % 4)
        bank.add(name, models[name])
    names = [*models, *models]
    random.Random(0).shuffle(names)
    held_to(bank, models, images(len(names), size=size_of(kind)), names)


def test_what_cannot_share_a_forward_is_told(tmp_path: Path) -> None:
    bank = Bank(family("plain"))
    for name in ("alore-0", "sct-0", "convpass-0", "bitfit-0", "vpt_deep-0", *CANNOT_MIX):
        bank.add(name, trained(name))
    told = dict(line.split(" × 1: ") for line in bank.explain().splitlines())
    assert "low-rank" in told["alore"] and "own form" in told["sct"] and "mapped" in told["convpass"]
    assert "tensors of each image" in told["bitfit"] and "insert tokens" in told["vpt_deep"]
    assert all("one forward for each" in told[name] and "weight" in told[name] for name in ("partial", "full"))
    apart = Bank(family("swin_v2"))
    apart.add("bitfit", trained("bitfit-0", "swin_v2"))
    assert "cpb_mlp" in apart.explain(), "a bias that no image passes"


@pytest.mark.parametrize("share", ["experts", "none"])
def test_17_tasks_with_passes_of_their_own_beside_other_adapters(share: str, tmp_path: Path) -> None:
    models = {"lora": trained("lora-0", outputs=3), "alore": trained("alore-0", seed=4)}
    for name, tasks in (("few", (2, 1)), ("many", (3, 4))):
        config = visgraft.ALoREConfig(share=share, tasks=tasks, dropout=0.0)
        model = visgraft.attach(vit(num_classes=sum(tasks)), config)
        models[name] = enliven(model, 5, strength=0.3).eval()
    bank = Bank(family("plain"))
    for name, model in models.items():
        bank.add(name, save(model, tmp_path / name) if name != "alore" else model)
    names = ["few", "lora", "many", "alore", "few"]
    held_to(bank, models, images(5), names)
    for name, column in zip(names, zip(*bank.every(images(3), names), strict=True), strict=True):
        found = torch.stack([answer.logits for answer in column])
        assert difference(found, logits(models[name], images(3))) <= TOLERANCE, name
    with bank.lent("many") as model:
        assert difference(model(images(2)), logits(models["many"], images(2))) <= TOLERANCE
    config = tmp_path / "few" / "adapter_config.json"
    config.write_text(config.read_text().replace("[\n      2,\n      1\n    ]", "[3, 1]"))
    with pytest.raises(AdapterError, match="is damaged: its tasks have 4 outputs in all, but it has 3"):
        bank.add("damaged", tmp_path / "few")


def test_forwards_are_as_few_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, runs = Bank(family("plain")), []
    for name in ("alore-0", "sct-0", "lora-0", "vpt_deep-0", "full-0"):
        for number in (1, 2):
            bank.add(f"{name} {number}", trained(name, seed=number))
    forward = type(family("plain")).forward_features
    monkeypatch.setattr(
        type(family("plain")), "forward_features", lambda m, x, **k: (runs.append(len(x)), forward(m, x, **k))[1]
    )
    bank(images(10), list(bank.names))
    assert sorted(runs) == [1, 1, 2, 6]


def held_to_every(kind: str, names: list[str], **options: Any) -> list[int]:
    """Every adapter's answer to every image; returns how many rows entered each block."""
    bank, models = Bank(family(kind)), {}
    for number, name in enumerate(names):
        config = dataclasses.replace(CONFIGS[name], **(options if CONFIGS[name].has_places else {}))
        model = fitted(config, kind, alive=False)
        model.reset_classifier(2 + number)
        models[f"{name} {number}"] = enliven(model, number).eval()
        bank.add(f"{name} {number}", models[f"{name} {number}"])
    entered: list[int] = []
    blocks = {type(family(kind).get_submodule(b["stream.in"].host)) for b in find_sites(family(kind)).blocks}
    with pytest.MonkeyPatch.context() as patch:
        for block in blocks:
            forward = block.forward
            patch.setattr(
                block, "forward", lambda m, x, *a, _f=forward, **k: (entered.append(len(x)), _f(m, x, *a, **k))[1]
            )
        found = bank.every(images(3, size=size_of(kind)), [*models, next(iter(models))])
    for name, column in zip([*models, next(iter(models))], zip(*found, strict=True), strict=True):
        expected = logits(models[name], images(3, size=size_of(kind)))
        assert [answer.adapter for answer in column] == [name] * 3
        assert difference(torch.stack([answer.logits for answer in column]), expected) <= TOLERANCE, name
    return entered


@pytest.mark.parametrize("kind", ["plain", "deit_distilled", "swin", "convnext", "eva_fused", "mixer"])
def test_every_adapter_answers_every_image_and_shared_blocks_run_once(kind: str) -> None:
    name = "adapter-0"
    late = held_to_every(kind, [name, "arc-0", name, "linear-0"], last_blocks=1)
    assert late[-1] == 12 and set(late[:-1]) == {3}
    assert set(held_to_every(kind, [name, "arc-0"])) == {6}, "the first block is adapted"
    assert set(held_to_every(kind, [name, "linear-0"])) == {3}, "what shares no block runs apart from what does"
    assert set(held_to_every(kind, ["linear-0", "linear-0"])) == {3}, "only heads differ"


def test_every_answers_also_with_what_cannot_share() -> None:
    entered = held_to_every("plain", ["bitfit-0", "full-0", "vpt_deep-0", "vpt_deep-0", "sct-0"])
    assert sorted(entered) == [3] * 3 + [6] * 6
    with pytest.raises(DataError, match="one tensor"):
        Bank(family("plain")).every([images(1)[0]], [])  # type: ignore[arg-type]
    assert Bank(family("plain")).every(images(2), []) == [[], []]
    with pytest.raises(VisgraftError, match="'a' is one"):
        Bank(family("plain")).every(images(2), "a")


def test_heads_of_every_kind_answer_side_by_side() -> None:
    bank, models = Bank(family("deit_distilled")), {}
    for outputs in (1, 4, 9):
        models[str(outputs)] = trained("lora-0", "deit_distilled", seed=outputs, outputs=outputs)
    deep = fitted(CONFIGS["lora-0"], "plain", alive=False)
    for name, model in models.items():
        bank.add(name, model)
    held_to(bank, models, images(6, size=size_of("deit_distilled")), ["9", "1", "4", "9", "4", "1"])
    deep.head = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 6))
    models = {"deep": enliven(deep, 3).eval(), "plain": trained("sct-0"), "other": trained("lora-0", outputs=2)}
    models["deep 2"] = enliven(copy.deepcopy(deep), 4).eval()
    bank = Bank(family("plain"))
    for name, model in models.items():
        bank.add(name, model)
    held_to(bank, models, images(5), ["deep", "plain", "deep 2", "other", "plain"])


def test_without_a_head_the_features_are_the_answer() -> None:
    model = fitted(CONFIGS["lora-0"], "plain", num_classes=0)
    bank = Bank(family("plain"))
    bank.add("features", model)
    bank.add("classes", trained("sct-0"))
    found = answers(bank, images(2), ["features", "classes"])
    assert difference(found[0], logits(model, images(2))[0]) <= TOLERANCE and len(found[1]) == 5


def test_a_backbone_without_a_head_takes_adapters_with_heads() -> None:
    bank, models = Bank(family("plain", num_classes=0)), {name: trained(name) for name in ("linear-0", "lora-0")}
    for name, model in models.items():
        bank.add(name, model)
    held_to(bank, models, images(3), ["linear-0", "lora-0", "linear-0"])


def test_answers_carry_classes_and_probabilities(tmp_path: Path) -> None:
    model = trained("alore-0", outputs=2)
    facts = {"data": {"multi_label": True}}
    bank = Bank(family("plain"))
    bank.add("several", save(model, tmp_path / "several", classes=["scratch", "dent"], record=facts))
    bank.add("one", save(trained("alore-0"), tmp_path / "one"))
    several, one = bank(images(2), ["several", "one"])
    assert several.classes == ("scratch", "dent") and several.multi_label and several.adapter == "several"
    assert torch.allclose(several.probabilities, several.logits.sigmoid())
    assert one.classes == () and torch.allclose(one.probabilities.sum(), torch.ones(()))
    assert bank.record("several").classes == ("scratch", "dent")


def test_pictures_are_prepared_as_each_adapter_was_trained(tmp_path: Path) -> None:
    facts = visgraft.model_data_config(family("plain"))
    grey, black = ({**facts, "mean": mean} for mean in ((0.5,) * 3, (0.1,) * 3))
    model = trained("lora-0")
    bank = Bank(family("plain"))
    bank.add("grey", save(model, tmp_path / "grey", data_config=grey))
    dark = {"data": {"background": "black"}}
    bank.add("black", save(model, tmp_path / "black", data_config=black, record=dark))
    file = tmp_path / "picture.png"
    Image.new("RGBA", (20, 20), (200, 10, 10, 128)).save(file)
    found = answers(bank, [file, file], ["grey", "black"])
    for name, logit in zip(("grey", "black"), found, strict=True):
        adapted = visgraft.load(tmp_path / name, backbone=family("plain"))
        best = {int(c): p for c, p in visgraft.predict(adapted, [file], top=5)[0]}
        assert torch.allclose(logit.softmax(0), torch.tensor([best[i] for i in range(5)]), atol=1e-5)
    assert difference(found[0], found[1]) > 1e-3


def test_images_of_several_sizes_come_in_one_call() -> None:
    bank, models = Bank(family("convnext")), {}
    for number in (1, 2):
        models[str(number)] = trained("alore-0", "convnext", seed=number)
        bank.add(str(number), models[str(number)])
    x = [images(1, n, size=size)[0] for n, size in enumerate((32, 64, 32, 64))]
    for found, name, image in zip(answers(bank, x, ["1", "1", "2", "2"]), "1122", x, strict=True):
        assert difference(found, logits(models[name], image[None])[0]) <= TOLERANCE


@pytest.mark.parametrize("name", ["alore-0", "sct-0", "ssf-0", "adapter-0", "bitfit-0", "convpass-0", "vpt_deep-0"])
def test_each_adapter_answers_in_its_own_precision(name: str) -> None:
    model, bank = trained(name), Bank(family("plain"))
    for precision in ("fp32", "bf16"):
        adapted = Adapted.of(model)
        record = dataclasses.replace(adapted.record, precision=precision)
        for number in (1, 2):
            bank.add(f"{precision} {number}", Adapted(model, record))
    names = ["bf16 1", "fp32 1", "bf16 2", "fp32 2"]
    x = images(1).expand(4, -1, -1, -1)
    found = answers(bank, x, names)
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(model, x[:1])[0]
    assert difference(found[1], logits(model, x[:1])[0]) <= TOLERANCE
    assert found[0].dtype == half.dtype and difference(found[0].float(), half.float()) < 0.05
    assert not torch.equal(found[0].float(), found[1])


COMPILED = ("alore-0", "sct-0", "bitfit-0", "ssf-0", "convpass-0", "vpt_deep-0")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "alore-0" else pytest.mark.long) for n in COMPILED])
def test_compiled_other_adapters_compile_nothing_anew(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile = functools.partial(torch.compile, fullgraph=True, backend=counter)
    bank, x = Bank(family("plain", depth=2), compile=compile), images(4)
    model = fitted(CONFIGS[name], "plain", alive=False, depth=2)
    models = {str(seed): enliven(copy.deepcopy(model), seed).eval() for seed in range(6)}
    for number in "0123":
        bank.add(number, models[number])
    held_to(bank, models, x, [*"0123"])
    held_to(bank, models, x, [*"1111"])
    compiled = counter.frame_count
    bank.remove("3")
    for number in "45":
        bank.add(number, models[number])
    for names in ("4520", "5504", "4444", "5555"):
        held_to(bank, models, x, [*names])
    assert counter.frame_count == compiled == 2, "one graph for several adapters, one for one"


HALF = ("lora-0", "bitfit-0", "alore-0", "dora-0")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in ("plain", "convnext") else pytest.mark.long) for k in ALL_FAMILIES]
)
def test_one_adapter_in_bf16_answers_as_attached_bit_for_bit(kind: str) -> None:
    bank, x = Bank(family(kind)), images(3, size=size_of(kind))
    before, names = bank.memory().backbone, [name for name in HALF if not refused(name, kind)]
    for name in names:
        model = trained(name, kind).requires_grad_(False)
        adapted = Adapted.of(model)
        bank.add(name, Adapted(model, dataclasses.replace(adapted.record, precision="bf16")))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(torch.stack(answers(bank, x, [name] * 3)), logits(model, x)), name
        with bank.lent(name) as lent:
            assert torch.equal(logits(lent, x), logits(model, x)), "what is lent computes in fp32"
    assert before < bank.memory().backbone < 1.6 * before


def stream_precisions(module: nn.Module, hosts: set[str], run: Any) -> dict[str, torch.dtype]:
    """In what precision each block's output is."""
    seen: dict[str, torch.dtype] = {}

    def note(path: str, out: Any) -> None:
        seen[path] = (out[0] if isinstance(out, tuple) else out).dtype

    handles = [
        module.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: note(path, out)) for path in hosts
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "swin" else pytest.mark.long) for k in ALL_FAMILIES])
def test_the_stream_of_a_mixed_batch_is_as_narrow_as_attached(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, mixed = MixedTree.run, []
    x, hosts = images(2, size=size_of(kind)), {block["stream.in"].host for block in find_sites(family(kind)).blocks}

    def noting(tree: MixedTree, x: Any, forward: Any) -> Any:
        out = []
        mixed.append(stream_precisions(tree.model, hosts, lambda: out.append(run(tree, x, forward))))
        return out[0]

    monkeypatch.setattr(MixedTree, "run", noting)
    ran = 0
    for name in (name for name, k in PAIRS if k == kind and not refused(name, k) and name not in CANNOT_MIX):
        model, bank = trained(name, kind).requires_grad_(False), Bank(family(kind))
        for number in "12":
            bank.add(number, Adapted(model, dataclasses.replace(Adapted.of(model).record, precision="bf16")))
        bank(x, ["1", "2"])
        with torch.autocast("cpu", torch.bfloat16):
            attached = stream_precisions(model, hosts, lambda model=model: logits(model, x))
        assert all(found == attached for found in mixed), name
        ran += len(mixed)
        mixed.clear()
    assert ran > 10, "most share a forward"


def test_ssf_scales_in_a_wider_precision_some_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = next(iter(get_attached(trained("ssf-0")).positions.values()))
    x, tensors = torch.randn(5, 3, 8).bfloat16(), {"gain": torch.randn(5, 8), "shift": torch.randn(5, 8)}
    expected = torch.addcmul(tensors["shift"][:, None], x.float(), 1 + tensors["gain"][:, None]).bfloat16()
    for most in (1, 48, 2**18):
        monkeypatch.setattr(sys.modules[type(module).__module__], "MOST_WIDE", most)
        assert torch.equal(module.by_rows(tensors, x, x), expected)
