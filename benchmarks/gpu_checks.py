"""The parts of gpu.py that ask whether answers are right on a device, and what inference costs there."""

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import shared
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visgraft
from visgraft.adapters.directory import adapter_tensors
from visgraft.errors import SiteError
from visgraft.export.merge import why_not_merged
from visgraft.methods import get_method
from visgraft.methods.salience import salient_channels_at

CLASSES = 100
FLAT: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES: dict[str, Any] = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
TINY: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224": FLAT,
    "vit_base_patch16_224": FLAT,
    "vit_large_patch16_224": FLAT,
    "swin_tiny_patch4_window7_224": {**STAGES, "window_size": 2},
    "swin_base_patch4_window7_224": {**STAGES, "window_size": 2},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128)},
}
CHECKED = ("vit_base_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny")
METHODS = ("sct", "alore", "lora", "ssf", "bitfit", "vpt_deep")
MERGING: dict[str, dict[str, Any]] = {"alore": {}, "lora": {}, "ssf": {}, "sct": {"mode": "mlp", "score": "random"}}
BF16_FACTOR = 4.0  # as in the laws: of the error that a plain model computing the same function has in bf16


def backbone(run: Any, name: str, **changes: Any) -> nn.Module:
    """Return a backbone with random weights on the run's device, or a tiny one of its family."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, **{**(TINY[name] if run.tiny else {}), **changes}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("gamma"):  # 1e-6 as made, which would hide whatever happens in a block
                parameter.fill_(1.0)
    return model.to(run.device)


def images(run: Any, model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Return random images [B, 3, H, W] of the model's size, and labels."""
    size = 32 if run.tiny and not hasattr(model, "patch_embed") else visgraft.model_data_config(model)["input_size"][1]
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 3, size, size, generator=generator)
    return x.to(run.device), (torch.arange(count) % CLASSES).to(run.device)


def logits(model: nn.Module, x: Tensor, bf16: bool = False) -> Tensor:
    """Return what the model answers in eval mode, in fp32."""
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        return model.eval()(x).float()


def correctness(run: Any) -> None:
    """Hold methods on three families to the laws: gradients, storage, merging, bf16, taking off."""
    torch.backends.cudnn.allow_tf32 = False  # convolutions otherwise differ from a CPU's in the fourth digit
    for name in CHECKED:
        plain = backbone(run, name)
        x, y = images(run, plain, 16)
        for method in METHODS:
            with run.measuring("correctness", 5, backbone=name, method=method) as ready:
                if ready:
                    run.record("correctness", backbone=name, method=method, **laws(plain, method, x, y))


def laws(plain: nn.Module, method: str, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Attach, train, store, load, merge, compute in bf16, detach; return what was found and whether it is right."""
    model = copy.deepcopy(plain)
    try:
        visgraft.attach(model, get_method(method).Config(), [(x, y)])
    except SiteError as error:
        return {"ok": True, "refused": str(error)}
    losses = train_a_little(model, x, y)
    gradients = all((p.grad is not None) == p.requires_grad for p in model.parameters())
    answer = logits(model, x)
    moved = (answer - logits(plain, x)).abs().max().item()
    with tempfile.TemporaryDirectory() as folder:
        path = visgraft.save(model, Path(folder) / "adapter")
        loaded = visgraft.load(path, backbone=copy.deepcopy(plain).cpu()).model
    stored = {k: torch.equal(v, adapter_tensors(model)[k]) for k, v in adapter_tensors(loaded).items()}
    away = (logits(loaded, x.cpu()) - answer.cpu()).abs().max().item() / answer.abs().max().item()
    back = (logits(loaded.to(x.device), x) - answer).abs().max().item()
    found: dict[str, Any] = {
        "loss_before": losses[0], "loss_after": losses[-1], "moved": moved, "on_cpu": away, "back": back,
    }  # fmt: skip
    peer, why = plain, why_not_merged(plain, get_method(method).Config())
    if why is None:
        peer, certificate = visgraft.merge(model, x)
        found |= {"difference": certificate.max_abs_difference, "fold": certificate.fold_difference}
        found["merged_error"] = certificate.merged_error / max(certificate.adapted_error, 1e-30)
    errors = [(logits(one, x, True) - logits(one, x)).norm() / logits(one, x).norm() for one in (model, peer)]
    found["bf16"] = (errors[0] / errors[1]).item()
    detached = torch.equal(logits(visgraft.detach(model), x), logits(plain, x))
    right = {
        "gradients": gradients, "stored": all(stored.values()), "bit for bit": back == 0, "detached": detached,
        "bf16": found["bf16"] <= BF16_FACTOR, "moved": moved > 0, "loss": losses[-1] < losses[0], "on cpu": away < 1e-4,
    }  # fmt: skip
    wrong = [name for name, holds in right.items() if not holds]
    return {"ok": not wrong, **({"wrong": ", ".join(wrong)} if wrong else {}), **found}


def train_a_little(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Make a few steps in place and return the losses; gradients are left."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    model.train()
    losses = []
    for _ in range(4):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def compiled_answers(run: Any) -> None:
    """Hold compiled models against eager ones: logits and the gradient of every trained tensor, in fp32, two blocks."""
    torch.backends.cudnn.allow_tf32 = False
    name = "vit_base_patch16_224"
    plain = backbone(run, name, depth=2)
    x, y = images(run, plain, 8)
    for method in METHODS[:1] if run.tiny else METHODS:
        with run.measuring("compiled_answers", 20, backbone=name, method=method) as ready:
            if ready:
                torch._dynamo.reset()
                model = visgraft.attach(copy.deepcopy(plain), get_method(method).Config(), [(x, y)]).eval()
                begin = time.perf_counter()
                one = torch.compile(model, fullgraph=True, backend="aot_eager" if run.tiny else "inductor")
                found = [gradients(model, answer, x, y) for answer in (one, model)]
                apart = max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(*found, strict=True))
                seconds = round(time.perf_counter() - begin, 1)
                run.record(
                    "compiled_answers", backbone=name, method=method, ok=apart < 1e-4, apart=apart, seconds=seconds
                )


def gradients(model: nn.Module, answer: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return logits and the gradients of all that trains, of a step in eval mode, where nothing is drawn."""
    model.zero_grad(set_to_none=True)
    found = answer(x)
    F.cross_entropy(found, y).backward()
    return [found.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def inference(run: Any) -> None:
    """Time a merged and an adapted model against the plain one, and SCT's scoring against a forward pass."""
    for name in ("vit_base_patch16_224", "swin_tiny_patch4_window7_224"):
        plain = backbone(run, name)
        for method, options in MERGING.items():
            for count in (64, 1):
                with run.measuring("inference", 15, backbone=name, method=method, images=count) as ready:
                    if ready:
                        figures = against_plain(run, plain, method, options, 2 if run.tiny else count)
                        run.record("inference", backbone=name, method=method, images=count, **figures)
        for mode, sites in (("attn", ["stream.mid"]), ("mlp", ["stream.out"])):
            with run.measuring("scoring", 15, backbone=name, mode=mode) as ready:
                if ready:
                    run.record("scoring", backbone=name, mode=mode, **scoring(run, plain, sites))


def against_plain(run: Any, plain: nn.Module, method: str, options: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the times of the plain, the merged and the adapted model in bf16."""
    x, y = images(run, plain, count)
    model = visgraft.attach(copy.deepcopy(plain), get_method(method).Config(**options), [(x, y)])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    merged = visgraft.merge(model.eval(), x)[0]
    models = {"plain": plain, "merged": merged, "adapted": model}
    parts = {
        key: run.seconds(lambda one=one: logits(one, x, True), 10)  # type: ignore[misc]
        for key, one in models.items()
    }
    rounds = shared.in_turns(parts, 3 if run.tiny else 15)
    return {
        "plain_ms": round(1000 * shared.quartiles([one["plain"] for one in rounds])[1], 3),
        "merged": shared.ratios(rounds, "merged", "plain"),
        "adapted": shared.ratios(rounds, "adapted", "plain"),
    }


def scoring(run: Any, plain: nn.Module, sites: list[str]) -> dict[str, Any]:
    """Return the time of scoring every channel on a few batches against that of plain forward passes."""
    batches = [tuple(t.cpu() for t in images(run, plain, 4 if run.tiny else 32)) for _ in range(4)]

    def forward() -> None:
        for x, _ in batches:
            logits(plain, x.to(run.device))

    parts = {
        "plain": run.seconds(forward, 2),
        "scoring": run.seconds(lambda: salient_channels_at(plain, batches, None, sites, "class_aware"), 2),
    }
    rounds = shared.in_turns(parts, 3 if run.tiny else 9)
    return {"scoring": shared.ratios(rounds, "scoring", "plain")}
