"""The laws that every registered method obeys on every family; a new method is held to them by its name."""

import copy
import dataclasses
import functools
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    ALL_FAMILIES,
    CONFIGS,
    DEFAULTS,
    PAIRS,
    batches,
    enliven,
    family,
    fitted,
    gradients,
    images,
    logits,
    refused,
    shallow,
    size_of,
)  # fmt: skip
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from visgraft import attach, count_parameters, detach, list_methods, load, merge, save
from visgraft.core.attached import get_attached
from visgraft.core.finding import find_sites
from visgraft.core.taps import Kept
from visgraft.core.tensors import CHILD
from visgraft.errors import MergeError, SiteError, VisgraftError
from visgraft.export.merge import why_not_merged

SMALL_FILE = 16 * 1024
REFUSED = [(name, kind) for name, kind in PAIRS if refused(name, kind)]
OBEYING = [pair for pair in PAIRS if pair not in REFUSED]
each_pair = pytest.mark.parametrize(("name", "kind"), OBEYING, ids=lambda value: value)


def often(name: str, kind: str) -> bool:
    """Whether a slow law holds this pair in each run: every method on a ViT, and a third of those on each family."""
    if kind == "plain":
        return True
    there = [other for other, family in OBEYING if family == kind]
    return there.index(name) % 3 == ALL_FAMILIES.index(kind) % 3


def in_turn(pairs: list[tuple[str, str]]) -> Any:
    """A slow law's pairs, those of other turns marked `long`."""
    marked = [pair if often(*pair) else pytest.param(*pair, marks=pytest.mark.long) for pair in pairs]
    return pytest.mark.parametrize(("name", "kind"), marked, ids=lambda value: value)


def test_every_method_and_every_family_has_its_turn_in_slow_laws() -> None:
    kept = [pair for pair in OBEYING if often(*pair)]
    for names, families in ((DEFAULTS, ALL_FAMILIES), (list(CONFIGS), ["plain"])):
        assert {name for name, kind in kept if kind in families} >= set(names)
        assert {kind for name, kind in kept if name in names} >= set(families)
    methods = [{name for name, kind in kept if kind == each} for each in ALL_FAMILIES]
    assert min(map(len, methods)) >= 4, "methods on every family"


@functools.cache
def _attached(name: str, kind: str, alive: bool) -> nn.Module:
    if alive:  # attaching takes much longer than copying
        return enliven(copy.deepcopy(_attached(name, kind, False))).eval()
    return fitted(CONFIGS[name], kind, alive=False)


def adapted(name: str, kind: str, alive: bool = True) -> Any:
    """A copy of a tiny backbone with a method attached; law 10 says that copies are whole."""
    return copy.deepcopy(_attached(name, kind, alive))


def pictures(kind: str, count: int = 6, seed: int = 0) -> Tensor:
    return images(count, seed, size=size_of(kind))


@pytest.mark.parametrize(("name", "kind"), REFUSED, ids=lambda value: value)
def test_a_family_without_the_places_is_refused_by_name(name: str, kind: str) -> None:
    model = family(kind)
    keys = set(model.state_dict())
    with pytest.raises(SiteError, match=refused(name, kind)):
        attach(model, CONFIGS[name], batches(size=size_of(kind)))
    assert set(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@each_pair
def test_1_the_keys_of_the_backbone_stay(name: str, kind: str) -> None:
    before = set(family(kind).state_dict())
    after = set(adapted(name, kind).state_dict())
    assert before <= after
    assert all(key.startswith(f"{CHILD}.") for key in after - before)


@in_turn(OBEYING)
def test_2_a_method_starts_where_it_claims_to(name: str, kind: str) -> None:
    config, x = CONFIGS[name], pictures(kind)
    plain, started = logits(family(kind), x), logits(adapted(name, kind, alive=False), x)
    if config.starts_as_identity:
        # In float64, where rounding hides nothing else. Bit for bit it is only where the same kernels run: a bias added
        # in a step of its own (Swin V2), or a convolution whose input lies otherwise in memory, rounds otherwise.
        exact = logits(family(kind).double(), x.double())
        begun = logits(adapted(name, kind, alive=False).double(), x.double())
        assert (begun - exact).abs().max() <= 1e-12 * exact.abs().max()
    else:
        assert not torch.allclose(started, plain, atol=1e-4)
    assert not torch.allclose(logits(adapted(name, kind), x), plain, atol=1e-4), "the modules change nothing"


@each_pair
def test_4_what_trains_gets_a_gradient_and_nothing_else_does(name: str, kind: str) -> None:
    model = adapted(name, kind).train()
    torch.manual_seed(0)
    F.cross_entropy(model(pictures(kind)), torch.arange(6) % 5).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
        else:
            assert parameter.grad is None, parameter_name


@each_pair
def test_5_the_count_is_that_of_the_trainable_tensors(name: str, kind: str) -> None:
    model, plain = adapted(name, kind), family(kind)
    numbers, head = count_parameters(model), sum(p.numel() for m in heads(plain) for p in m.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert numbers.head == head
    assert numbers.adapter == trained - head
    added = sum(p.numel() for p in getattr(model, CHILD).parameters())
    assert numbers.total == sum(p.numel() for p in plain.parameters()) + added


def heads(model: Any) -> list[nn.Module]:
    found = model.get_classifier()
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
def test_6_an_adapter_loads_in_a_fresh_process_to_the_same_logits_bit_for_bit(every: bool, tmp_path: Path) -> None:
    expected = {}
    for name, kind in [pair for pair in OBEYING if every or often(*pair)]:
        folder = tmp_path / f"{name}-{kind}"
        model = adapted(name, kind)
        save(model, folder)
        expected[folder.name] = logits(model, pictures(kind))
        held = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        assert (folder / "adapter_model.safetensors").stat().st_size <= 1.05 * held + SMALL_FILE
    script = (
        "import sys, torch, visgraft; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from support import family, images, logits, size_of\n"
        "kinds = {p: p.name.split('-')[2] for p in Path(sys.argv[1]).iterdir()}\n"
        "found = {p.name: logits(visgraft.load(p, backbone=family(k)).model, images(size=size_of(k)))"
        " for p, k in kinds.items()}\n"
        "torch.save(found, sys.stdout.buffer)"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found = torch.load(io.BytesIO(done.stdout), weights_only=True)
    assert set(found) == set(expected)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@in_turn(OBEYING)
def test_7_and_8_merging_does_what_is_claimed(name: str, kind: str) -> None:
    config, plain = CONFIGS[name], family(kind)
    model, x = adapted(name, kind).double(), pictures(kind, 8, seed=5).double()
    before = logits(model, x)
    if why_not_merged(plain, config):
        with pytest.raises(MergeError, match="keep the adapter attached"):
            merge(model, x)
        return
    merged, certificate = merge(model, x)
    assert (logits(merged, x) - before).abs().max() <= 1e-9 * before.abs().max()
    assert certificate.top1_agreement == 1 and certificate.images == 8 and certificate.dtype == "float64"
    assert torch.equal(logits(model, x), before), "merging changed the adapted model"
    tree = [(path, type(module)) for path, module in plain.named_modules()]
    assert [(path, type(module)) for path, module in merged.named_modules()] == tree
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    single, certificate = merge(adapted(name, kind), pictures(kind, 8, seed=5))
    assert certificate.merged_error <= certificate.error_tolerance and certificate.top1_agreement == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in single.modules())


@in_turn(OBEYING)
def test_9_detaching_restores_the_logits_bit_for_bit(name: str, kind: str) -> None:
    plain, x = family(kind), pictures(kind)
    before, flags = logits(plain, x), {n: p.requires_grad for n, p in plain.named_parameters()}
    model = adapted(name, kind)
    assert detach(model) is model
    assert torch.equal(logits(model, x), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert set(model.state_dict()) == set(plain.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(VisgraftError, match="nothing is attached"):
        detach(model)


@in_turn(OBEYING)
def test_10_copies_and_pickles_are_whole_and_apart(name: str, kind: str) -> None:
    model, x = fitted(CONFIGS[name], kind).train(), pictures(kind)
    model(x).sum().backward()
    model.eval()
    expected = logits(model, x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied, x), expected)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(0.5)
        assert torch.equal(logits(model, x), expected), "the copy shares tensors with the original"
        detach(copied)
    assert not any(isinstance(v, Kept) and v.tensor is not None for v in map(_kept, hooks(model)))


def hooks(model: nn.Module) -> list[object]:
    found = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return found + [h.act for h in found if hasattr(h, "act")]


def _kept(hook: object) -> object:
    return getattr(hook, "kept", getattr(hook, "entry", None))


def seldom(pairs: list[tuple[str, str]], *always: str) -> list[Any]:
    """The pairs, those of other methods than `always` marked `long`: tracing takes seconds and seldom tells more."""
    return [pair if pair[0] in always else pytest.param(*pair, marks=pytest.mark.long) for pair in pairs]


TRAINED = [(name, "plain") for name in CONFIGS] + [("alore-0", "swin"), ("lora-0", "convnext"), ("fact-0", "beit")]
COMPILED = [("alore-0", kind) for kind in ("swin", "convnext", "mixer", "beit", "eva_fused")]
ANSWERING = [(name, kind) for name in ("sct-0", "alore-0") for kind in ALL_FAMILIES[1:] if (name, kind) in OBEYING]


@pytest.mark.parametrize(
    ("name", "kind"),
    seldom(TRAINED, "sct-0", "alore-0", "lora-0", "adaptformer-0", "vpt_deep-0"),
    ids=lambda value: value,
)
def test_11_it_compiles_into_one_graph_with_the_same_gradients(name: str, kind: str) -> None:
    torch._dynamo.reset()
    model, x = shallow(name, kind).double(), pictures(kind).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, model, x), gradients(model, model, x))


@pytest.mark.parametrize(
    ("name", "kind"),
    [pair if pair in COMPILED else pytest.param(*pair, marks=pytest.mark.long) for pair in ANSWERING],
    ids=lambda value: value,
)
def test_11_every_family_compiles_into_one_graph(name: str, kind: str) -> None:
    torch._dynamo.reset()
    model, x = shallow(name, kind).double(), pictures(kind).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, x), logits(model, x))


IN_BF16 = seldom([(name, "plain") for name in DEFAULTS], "sct-0", "alore-0", "lora-0", "fact-0", "ssf-0")


@pytest.mark.parametrize(("name", "kind"), IN_BF16, ids=lambda value: value)
def test_11_a_training_step_in_bf16_compiles_into_one_graph(name: str, kind: str) -> None:
    torch._dynamo.reset()
    model, x = shallow(name, kind).train(), pictures(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(compiled, model, x)
    for key, gradient in found.items():
        assert gradient is not None, key
        assert gradient.isfinite().all(), key


@in_turn(OBEYING)
def test_12_bf16_autocast_is_finite_and_close(name: str, kind: str) -> None:
    """Close means within four times the error that the same function, merged into a plain model, has in bf16.

    It is moved off its start only a little: far off, tiny models amplify every rounding until none can be compared.
    """
    config, x = CONFIGS[name], pictures(kind)
    model = enliven(adapted(name, kind, alive=False), strength=0.02).eval()
    peer = family(kind) if why_not_merged(family(kind), config) else merge(model, x)[0]
    assert bf16_error(model, x) <= 4 * bf16_error(peer, x), config
    model.bfloat16()
    assert logits(model, x.bfloat16()).isfinite().all()


def bf16_error(model: nn.Module, x: Tensor) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(model, x).float()
    full = logits(model, x)
    return float((half - full).norm() / full.norm())


@in_turn(OBEYING)
def test_13_from_one_method_to_another_and_back(name: str, kind: str) -> None:
    x = pictures(kind)
    expected, model = logits(adapted(name, kind), x), adapted(name, kind)
    other = next(c for n, c in CONFIGS.items() if c.method != CONFIGS[name].method and (n, kind) in OBEYING)
    with pytest.raises(VisgraftError, match="attached already"):
        attach(model, other, batches(size=size_of(kind)))
    trained = get_attached(model).originals
    kept = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(CHILD) or k in trained}
    attach(detach(model), other, batches(size=size_of(kind)))
    attach(detach(model), CONFIGS[name], batches(size=size_of(kind)))
    model.load_state_dict(kept, strict=False)
    assert torch.equal(logits(model.eval(), x), expected)


@in_turn(OBEYING)
def test_14_a_few_steps_lower_the_loss(name: str, kind: str) -> None:
    model = adapted(name, kind, alive=False)
    x, y = pictures(kind, 12), torch.arange(12) % 5
    before = F.cross_entropy(logits(model, x), y)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    torch.manual_seed(0)
    model.train()
    for _ in range(8):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert F.cross_entropy(logits(model.eval(), x), y) < before


@each_pair
def test_frozen_parts_stay_in_eval_mode_and_drop_path_follows(name: str, kind: str) -> None:
    model = adapted(name, kind).train()
    attached = get_attached(model)
    for path, module in model.named_modules():
        if isinstance(module, DropPath):
            assert module.training, path
        elif path and not f"{path}.".startswith((f"{CHILD}.", *(f"{head}." for head in attached.head))):
            own = path if next(module.parameters(), None) is not None else path.rpartition(".")[0]
            prefix = f"{own}." if own else ""
            assert not module.training or any(name.startswith(prefix) for name in attached.unfrozen), path
    assert all(m.training for m in getattr(model, CHILD).modules())
    model.eval()
    assert not any(m.training for m in model.modules())


IN_BLOCKS = [pair for pair in OBEYING if pair[0].endswith("-0") and CONFIGS[pair[0]].has_places]


@in_turn(IN_BLOCKS)
def test_the_last_blocks_can_be_adapted_alone(name: str, kind: str, tmp_path: Path) -> None:
    config, x = dataclasses.replace(CONFIGS[name], last_blocks=1), pictures(kind)
    model, blocks = fitted(config, kind), find_sites(family(kind)).blocks
    places = get_attached(model).where.values()
    assert {place.block for place in places} - {None} == {len(blocks) - 1}
    every = [place for place in get_attached(adapted(name, kind)).where.values() if place.block is not None]
    assert 0 < sum(place.block is not None for place in places) < len(every) or len(every) == 1
    entering: list[bool] = []
    last = model.get_submodule(blocks[-1]["stream.in"].host)
    handle = last.register_forward_pre_hook(lambda _, args: entering.append(args[0].requires_grad), prepend=True)
    F.cross_entropy(model.train()(x), torch.arange(6) % 5).backward()
    handle.remove()
    assert entering == [False], "the backward pass enters the frozen blocks"
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    expected = logits(model.eval(), x)
    assert not torch.allclose(expected, logits(family(kind), x), atol=1e-4)
    save(model, tmp_path / "adapter")
    assert torch.equal(logits(load(tmp_path / "adapter", backbone=family(kind)).model, x), expected)
    assert (why_not_merged(family(kind), config) is None) >= (why_not_merged(family(kind), CONFIGS[name]) is None)
    if not why_not_merged(family(kind), config):
        merged = merge(model.double(), x.double())[0]
        assert (logits(merged, x.double()) - logits(model, x.double())).abs().max() <= 1e-9 * expected.abs().max()
    assert torch.equal(logits(detach(fitted(config, kind)), x), logits(family(kind), x))


@pytest.mark.parametrize("name", list_methods())
def test_16_every_method_has_its_row_in_the_docs(name: str) -> None:
    table = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1, f"docs/methods.md needs one row that starts with | `{name}` |"
    assert list_methods()[name].paper.removeprefix("arXiv:") in rows[0]
    assert json.loads(json.dumps(list_methods()[name].Config().to_dict())) == list_methods()[name].Config().to_dict()
