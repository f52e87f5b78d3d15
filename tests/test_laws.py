"""The laws that every registered method obeys on every kind of ViT block; a new method is held to them by its name."""

import copy
import io
import itertools
import json
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import CONFIGS, VARIANTS, batches, fitted, images, logits, vit
from timm.layers import DropPath
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import nn
from torch.nn import functional as F

from visgraft import attach, count_parameters, detach, merge, methods, save
from visgraft.attach import CHILD, get_attached
from visgraft.errors import MergeError, SiteError, VisgraftError
from visgraft.merge import mergeable
from visgraft.sites import find_sites
from visgraft.taps import Kept, tap

SMALL_FILE = 16 * 1024
PAIRS = list(itertools.product(CONFIGS, VARIANTS))
each_pair = pytest.mark.parametrize(("name", "variant"), PAIRS, ids=lambda value: value)
each_config = pytest.mark.parametrize("name", CONFIGS)
WITH_SITES = [name for name, config in CONFIGS.items() if methods()[config.method].placements(config)]


def place_is_missing(name: str, variant: str) -> bool:
    """Whether attaching must be refused: SwiGLU has two first layers, hence no `mlp.hidden`."""
    return variant == "swiglu" and "fc1" in getattr(CONFIGS[name], "targets", ())


@each_pair
def test_1_the_keys_of_the_backbone_stay(name: str, variant: str) -> None:
    before = set(vit(variant).state_dict())
    after = set(fitted(CONFIGS[name], variant).state_dict())
    assert before <= after
    assert all(key.startswith(f"{CHILD}.") for key in after - before)


@each_pair
def test_2_a_method_starts_where_it_claims_to(name: str, variant: str) -> None:
    config, plain = CONFIGS[name], logits(vit(variant))
    started = logits(fitted(config, variant, alive=False))
    if methods()[config.method].starts_as_identity(config):
        assert torch.equal(started, plain)
    else:
        assert not torch.allclose(started, plain, atol=1e-4)
    assert not torch.allclose(logits(fitted(config, variant)), plain, atol=1e-4), "the modules change nothing"


@pytest.mark.parametrize("variant", VARIANTS)
def test_3_every_site_is_the_tensor_its_row_names(variant: str) -> None:
    model, seen, handles = vit(variant), {}, []

    class Note:
        def __init__(self, key: tuple[int, str]) -> None:
            self.key = key

        def __call__(self, value: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
            assert self.key not in seen
            seen[self.key] = value
            return onto

    blocks = find_sites(model)
    for number, sites in enumerate(blocks):
        for site in sites.values():
            handles += tap(model, site, Note((number, site.name)))
    x = images(2)
    logits(model, x)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        stream = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for number, block in enumerate(model.blocks):
            attended = block.attn(block.norm1(stream))
            middle = stream + block.ls1(attended)
            branch = block.mlp(block.norm2(middle))
            expected = {
                "attn.in": block.norm1(stream), "attn.out": attended, "stream.mid": middle,
                "mlp.in": block.norm2(middle), "mlp.out": branch, "attn.qkv": block.attn.qkv(block.norm1(stream)),
            }  # fmt: skip
            stream = middle + block.ls2(branch)
            expected["stream.out"] = stream
            for name, tensor in expected.items():
                torch.testing.assert_close(seen.pop((number, name)), tensor, msg=f"{name} of block {number}")
    assert {name for _, name in seen} <= {"attn.q", "attn.k", "attn.v", "attn.context", "mlp.hidden", "mlp.act"}


@pytest.mark.parametrize("name", WITH_SITES)
@pytest.mark.parametrize("block", [ResPostBlock, ParallelScalingBlock])
def test_3_unknown_blocks_are_refused_by_name(name: str, block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, block_fn=block)
    keys = set(model.state_dict())
    with pytest.raises(SiteError, match=block.__name__):
        attach(model, CONFIGS[name], batches())
    assert set(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def bypass_qkv(attn: nn.Module, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Attention that reads the weights of qkv without calling the module, as timm's BEiT does."""
    return attn.proj(F.linear(x, attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1)[2])


def bypass_drop_path(block: nn.Module, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """A block that never calls the module after which the stream is read."""
    x = x + block.ls1(block.attn(block.norm1(x)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def post_norm(block: nn.Module, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """A block that normalises after the sum, so what norm2 receives is not the stream."""
    x = block.norm1(x + block.drop_path1(block.ls1(block.attn(x))))
    return x + block.mlp(block.norm2(x))


def change_after_projection(mlp: nn.Module, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """An MLP whose output is not that of its last linear layer: nothing could be folded into it."""
    return mlp.fc2(mlp.act(mlp.fc1(x))) * 2


@pytest.mark.parametrize(
    ("name", "part", "forward"),
    [
        ("lora-0", "attn", bypass_qkv),
        ("sct-0", "", bypass_drop_path),
        ("sct-0", "", post_norm),
        ("sct-1", "mlp", change_after_projection),
        ("alore-1", "mlp", change_after_projection),
    ],
)
def test_3_a_block_whose_forward_differs_is_refused(name: str, part: str, forward: Callable[..., torch.Tensor]) -> None:
    """Names and hooks are all there; only the identity of the tensors shows that they are in the wrong place."""
    model = vit()
    for block in model.blocks:
        module = block.get_submodule(part)
        module.forward = types.MethodType(forward, module)
    with pytest.raises(SiteError, match="block 0"):
        attach(model, CONFIGS[name], batches())
    assert not hasattr(model, CHILD)


def test_3_a_model_that_cannot_be_proven_is_refused() -> None:
    model = vit()
    norm = model.blocks[0].norm1
    model.blocks[0].norm1.forward = lambda x: F.layer_norm(x, (32,), norm.weight, norm.bias)
    with pytest.raises(SiteError, match="meta device"):
        attach(model, CONFIGS["alore-0"])


@each_pair
def test_4_what_trains_gets_a_gradient_and_nothing_else_does(name: str, variant: str) -> None:
    model = fitted(CONFIGS[name], variant).train()
    torch.manual_seed(0)
    F.cross_entropy(model(images()), torch.arange(6) % 5).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
        else:
            assert parameter.grad is None, parameter_name


@each_pair
def test_5_the_count_is_that_of_the_trainable_tensors(name: str, variant: str) -> None:
    model, plain = fitted(CONFIGS[name], variant), vit(variant)
    numbers, head = count_parameters(model), sum(p.numel() for p in plain.head.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert numbers.head == head
    assert numbers.adapter == trained - head
    added = sum(p.numel() for p in getattr(model, CHILD).parameters())
    assert numbers.total == sum(p.numel() for p in plain.parameters()) + added


def test_6_an_adapter_loads_in_a_fresh_process_to_the_same_logits_bit_for_bit(tmp_path: Path) -> None:
    expected = {}
    for name, variant in PAIRS:
        folder = tmp_path / f"{name}-{variant}"
        model = fitted(CONFIGS[name], variant)
        save(model, folder)
        expected[folder.name] = logits(model)
        held = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        assert (folder / "adapter_model.safetensors").stat().st_size <= 1.05 * held + SMALL_FILE
    script = (
        "import sys, torch, visgraft; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from support import logits, vit\n"
        "found = {p.name: logits(visgraft.load(p, backbone=vit(p.name.split('-')[2])).model)"
        " for p in Path(sys.argv[1]).iterdir()}\n"
        "torch.save(found, sys.stdout.buffer)"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found = torch.load(io.BytesIO(done.stdout), weights_only=True)
    assert set(found) == set(expected)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@each_pair
def test_7_and_8_merging_does_what_is_claimed(name: str, variant: str) -> None:
    config, plain = CONFIGS[name], vit(variant)
    model = fitted(config, variant).double()
    x = images(8, seed=5, dtype=torch.float64)
    before = logits(model, x)
    blocks = find_sites(plain) if methods()[config.method].placements(config) else []
    if not mergeable(config, blocks):
        with pytest.raises(MergeError, match="keep the adapter attached"):
            merge(model, x)
        return
    try:
        merged, certificate = merge(model, x)
    except MergeError as error:
        assert variant == "no_qkv_bias" and "no bias" in str(error) and name.startswith("lora") is False
        return
    assert (logits(merged, x) - before).abs().max() <= 1e-9 * before.abs().max()
    assert certificate.top1_agreement == 1 and certificate.images == 8 and certificate.dtype == "float64"
    assert torch.equal(logits(model, x), before), "merging changed the adapted model"
    tree = [(path, type(module)) for path, module in plain.named_modules()]
    assert [(path, type(module)) for path, module in merged.named_modules()] == tree
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    single, certificate = merge(fitted(config, variant), images(8, seed=5))
    assert certificate.max_abs_difference <= certificate.tolerance < 1e-3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in single.modules())


@each_pair
def test_9_detaching_restores_the_logits_bit_for_bit(name: str, variant: str) -> None:
    plain = vit(variant)
    before, flags = logits(plain), {n: p.requires_grad for n, p in plain.named_parameters()}
    model = fitted(CONFIGS[name], variant)
    assert detach(model) is model
    assert torch.equal(logits(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert set(model.state_dict()) == set(plain.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(VisgraftError, match="nothing is attached"):
        detach(model)


@each_pair
def test_10_copies_and_pickles_are_whole_and_apart(name: str, variant: str) -> None:
    model = fitted(CONFIGS[name], variant).train()
    model(images()).sum().backward()
    model.eval()
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(0.5)
        assert torch.equal(logits(model), expected), "the copy shares tensors with the original"
        detach(copied)
    assert not any(isinstance(v, Kept) and v.tensor is not None for v in map(_kept, hooks(model)))


def hooks(model: nn.Module) -> list[object]:
    found = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return found + [h.act for h in found if hasattr(h, "act")]


def _kept(hook: object) -> object:
    return getattr(hook, "kept", getattr(hook, "entry", None))


@pytest.mark.parametrize(
    ("name", "variant"), [(name, "plain") for name in CONFIGS] + [(f"{m}-0", "layer_scale") for m in methods()]
)
def test_11_it_compiles_into_one_graph(name: str, variant: str) -> None:
    torch._dynamo.reset()
    model = fitted(CONFIGS[name], variant)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model))


@each_pair
def test_12_bf16_autocast_is_finite_and_close(name: str, variant: str) -> None:
    """Close means within four times the error that the same function, merged into a plain model, has in bf16."""
    config, model = CONFIGS[name], fitted(CONFIGS[name], variant)
    try:
        peer, _ = merge(model)
    except MergeError:
        peer = vit(variant)
    assert bf16_error(model) <= 4 * bf16_error(peer), config
    model.bfloat16()
    assert logits(model, images().bfloat16()).isfinite().all()


def bf16_error(model: nn.Module) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(model).float()
    full = logits(model)
    return float((half - full).norm() / full.norm())


@each_config
def test_13_from_one_method_to_another_and_back(name: str) -> None:
    expected = logits(fitted(CONFIGS[name]))
    model = fitted(CONFIGS[name])
    other = next(config for config in CONFIGS.values() if config.method != CONFIGS[name].method)
    with pytest.raises(VisgraftError, match="attached already"):
        attach(model, other, batches())
    kept = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(CHILD) or k.startswith("head")}
    trained = {k: v.clone() for k, v in model.state_dict().items() if k in get_attached(model).originals}
    attach(detach(model), other, batches())
    attach(detach(model), CONFIGS[name], batches())
    model.load_state_dict(kept | trained, strict=False)
    assert torch.equal(logits(model.eval()), expected)


@each_pair
def test_14_a_few_steps_lower_the_loss(name: str, variant: str) -> None:
    model = fitted(CONFIGS[name], variant, alive=False).train()
    x, y = images(12), torch.arange(12) % 5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-2:]) < losses[0]


@each_pair
def test_frozen_parts_stay_in_eval_mode_and_drop_path_follows(name: str, variant: str) -> None:
    model = fitted(CONFIGS[name], variant).train()
    attached = get_attached(model)
    for path, module in model.named_modules():
        if isinstance(module, DropPath):
            assert module.training, path
        elif path and not path.startswith((CHILD, "head")) and not attached.unfrozen:
            assert not module.training, path
    assert all(m.training for m in getattr(model, CHILD).modules())
    model.eval()
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("name", methods())
def test_16_every_method_has_its_row_in_the_docs(name: str) -> None:
    table = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1, f"docs/methods.md needs one row that starts with | `{name}` |"
    assert methods()[name].paper.removeprefix("arXiv:") in rows[0]
    assert json.loads(json.dumps(methods()[name].Config().to_dict())) == methods()[name].Config().to_dict()
