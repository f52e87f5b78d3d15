"""Options that methods share: tensors that train too and their step size, the head first, crops, mixing, pooling."""

import importlib
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from support import CLASSES, family, fitted, images, logits, vit
from test_train import HALF, RECIPE, held, same, task
from torch.nn import functional as F

from visgraft import (
    AffineALoREConfig,
    ALoREConfig,
    Backbone,
    LinearConfig,
    LoRAConfig,
    TrainConfig,
    VisgraftError,
    attach,
    create_backbone,
)
from visgraft.backbones.creation import with_pool
from visgraft.backbones.heads import head_paths
from visgraft.core.configure import configure
from visgraft.core.tensors import CHILD
from visgraft.data.augment import augmentation
from visgraft.data.images import Images
from visgraft.errors import TrainingDiverged
from visgraft.options import MethodConfig
from visgraft.training.fit import fit, train_head
from visgraft.training.loop import train
from visgraft.training.objective import make_loss, mixing

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
NORMS = torch.nn.LayerNorm | torch.nn.GroupNorm
fitting: Any = importlib.import_module("visgraft.training.fit")


def trained_of_backbone(config: MethodConfig, variant: str = "plain") -> set[str]:
    """Names of the backbone's own tensors that train, the head's left out."""
    model = fitted(config, variant, alive=False)
    left_out = tuple(f"{path}." for path in (*head_paths(model), CHILD))
    return {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(left_out)}


@pytest.mark.parametrize("variant", ["plain", "swin", "convnext"])
@pytest.mark.parametrize("kind", ["biases", "norms", "biases+norms"])
def test_also_train_takes_exactly_what_it_names(kind: str, variant: str) -> None:
    model = family(variant)
    head = tuple(f"{path}." for path in head_paths(model))
    norms = {n for n, _ in model.named_parameters() if isinstance(model.get_submodule(n.rpartition(".")[0]), NORMS)}
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    wanted = (norms if "norms" in kind else set()) | (biases if "biases" in kind else set())
    assert trained_of_backbone(LoRAConfig(also_train=kind), variant) == {n for n in wanted if not n.startswith(head)}


def test_also_train_stays_in_the_adapted_blocks() -> None:
    every = trained_of_backbone(LoRAConfig(also_train="norms"))
    assert trained_of_backbone(LoRAConfig(also_train="norms", last_blocks=1)) == {
        name for name in every if name.startswith(("blocks.2.", "norm."))
    }


def test_also_train_is_refused_where_it_has_no_effect() -> None:
    with pytest.raises(VisgraftError, match="also_train has no effect on linear"):
        LinearConfig(also_train="norms")
    with pytest.raises(VisgraftError, match="also_train"):
        LoRAConfig(also_train="weights")
    with pytest.raises(VisgraftError, match="affine_alore without tensors of the backbone is alore"):
        AffineALoREConfig(also_train=None)


@pytest.mark.parametrize("variant", ["plain", "convnext"])
def test_affine_alore_is_alore_and_what_also_train_names(variant: str) -> None:
    assert trained_of_backbone(AffineALoREConfig(), variant) == trained_of_backbone(
        LoRAConfig(also_train="biases+norms"), variant
    )
    both = [fitted(config, variant, alive=False) for config in (AffineALoREConfig(), ALoREConfig())]
    modules = [{name: p.shape for name, p in model.named_parameters() if CHILD in name} for model in both]
    assert modules[0] == modules[1]
    method, recipe = configure("affine_alore", {})
    assert type(method).from_dict(method.to_dict()) == method
    assert recipe.backbone_lr == 10 * recipe.lr and recipe.augmented


def test_backbone_lr_moves_the_backbones_own_tensors_and_nothing_else() -> None:
    config = replace(RECIPE, epochs=1, warmup_epochs=0, batch_size=20, weight_decay=0.0, lr=1e-3)
    start, moved = dict(vit().state_dict()), []
    for rate in (None, 1e-5):
        model = attach(vit(), LoRAConfig(also_train="norms"), task().batches())
        train(model, task(), replace(config, backbone_lr=rate))
        state = model.state_dict()
        # The first step of Adam is as long as the learning rate.
        moved.append([float((state[n] - start[n]).abs().max()) for n in ("norm.weight", "head.weight")])
    assert moved[0] == pytest.approx([1e-3, 1e-3], rel=0.02) and moved[1] == pytest.approx([1e-5, 1e-3], rel=0.02)
    with pytest.raises(VisgraftError, match="backbone_lr has no effect: lora trains no tensor of the backbone"):
        train(attach(vit(), LoRAConfig()), task(), replace(config, backbone_lr=1e-3))


def test_the_head_that_comes_first_is_a_linear_probes() -> None:
    config = replace(RECIPE, head_first=4, seed=3)
    first, probe = vit(), attach(vit(), LinearConfig())
    train_head(first, task(), LoRAConfig(), config)
    train(probe, task(), configure("linear", {"epochs": 4, "seed": 3, "precision": "fp32", "batch_size": 8})[1])
    assert torch.equal(first.head.weight, probe.head.weight) and not torch.equal(first.head.weight, vit().head.weight)
    assert CHILD not in dict(first.named_children()) and all(p.requires_grad for p in first.parameters())
    with pytest.raises(VisgraftError, match="head_first has no effect: linear trains the head alone"):
        train_head(vit(), task(), LinearConfig(), config)


def test_the_method_starts_after_the_head_as_it_starts_without(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def pretend(model: Any, *_: Any, **__: Any) -> None:
        starts.append(held(model))
        torch.manual_seed(len(starts))  # as every epoch does

    monkeypatch.setattr(fitting, "train", pretend)
    for head_first in (None, 1):
        fit(vit(), LoRAConfig(), replace(RECIPE, head_first=head_first), task())
    without, _, after = starts
    assert same(without, after)


def test_a_head_that_diverges_first_leaves_a_plain_model_and_no_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise TrainingDiverged("the loss is no longer finite", 2)

    monkeypatch.setattr(fitting, "train", diverge)
    model = vit()
    with pytest.raises(TrainingDiverged, match="leave out head_first") as caught:
        fit(model, LoRAConfig(), replace(RECIPE, head_first=3), task())
    assert caught.value.last_good_epoch == 0  # none of the method's, so that nothing is written
    assert CHILD not in dict(model.named_children())


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_depend_on_seed_epoch_and_index_alone(channels: int) -> None:
    pixels = torch.randint(0, 256, (4, channels, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pictures = Images(pixels, torch.zeros(4, dtype=torch.long), HALF[:channels], HALF[:channels])
    crop, other = (augmentation(pictures, TrainConfig(crop_scale=0.3, seed=seed)) for seed in (0, 1))
    assert crop is not None and other is not None
    one = crop(torch.tensor([2]), 1)
    assert torch.equal(crop(torch.tensor([0, 2]), 1)[1:], one) and one.shape == pixels[:1].shape
    for changed in (crop(torch.tensor([2]), 2), other(torch.tensor([2]), 1), pixels[2:3]):
        assert not torch.equal(changed, one)


def test_a_crop_is_never_without_a_pixel() -> None:
    tiny = Images(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), HALF, HALF)
    crop = augmentation(tiny, TrainConfig(crop_scale=1e-12))
    assert crop is not None
    for epoch in range(200):
        assert crop(torch.tensor([0]), epoch).shape == (1, 3, 2, 2)
    for scale in (0.0, 1.0, float("nan")):
        with pytest.raises(VisgraftError, match="crop_scale"):
            TrainConfig(crop_scale=scale)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
@pytest.mark.parametrize("count", [1, 6])
def test_mixing_shares_images_and_labels_out_alike(options: dict[str, float], count: int) -> None:
    # Each image is full of one-hot colour, so that its mean tells which share of it is whose.
    y = torch.arange(count) % 3
    x = F.one_hot(y, 3).float()[:, :, None, None].expand(count, 3, 8, 8).contiguous()
    mix = mixing(TrainConfig(**options), y, CLASSES)
    assert mix is not None
    torch.manual_seed(0)
    mixed, shares = mix(x, y)
    assert shares.shape == (count, CLASSES)
    torch.testing.assert_close(shares.sum(1), torch.ones(count))
    torch.testing.assert_close(mixed.mean((2, 3)), shares[:, :3], atol=1e-6, rtol=0)
    assert (count == 1) == bool((shares.max(1).values == 1).all())
    weighed = make_loss(y, CLASSES, TrainConfig(class_weights="balanced", label_smoothing=0.1), torch.device("cpu"))
    assert weighed(torch.randn(count, CLASSES), shares).isfinite()


def test_mixing_is_refused_where_an_image_has_several_classes() -> None:
    with pytest.raises(VisgraftError, match="mixup and cutmix need one class per image"):
        mixing(TrainConfig(mixup=0.4), torch.ones(4, 3), 3)
    assert mixing(TrainConfig(), torch.zeros(4, dtype=torch.long), 3) is None


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax"])
def test_a_pooled_backbone_answers_as_timms_own(pool: str) -> None:
    arguments = {key: value for key, value in SMALL.items() if key != "img_size"}
    origin = with_pool(Backbone("vit_tiny_patch16_224", "none", 32, arguments=arguments), pool)
    ours = create_backbone(origin, 3).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=3, global_pool=pool, fc_norm=False).eval()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(logits(ours, images(2, size=32)), logits(theirs, images(2, size=32)))
    assert Backbone.from_dict(origin.to_dict()) == origin


@pytest.mark.parametrize(
    ("name", "pool", "told"),
    [
        ("deit_tiny_distilled_patch16_224", "avg", "deit_tiny_distilled_patch16_224 does not pool by 'avg'"),
        ("mixer_s32_224", "max", "mixer_s32_224 does not pool by 'max'"),
        ("convnext_atto", "token", "convnext_atto does not pool by 'token'"),
        ("vit_base_patch16_siglip_224", "avg", "vit_base_patch16_siglip_224 does not pool by 'avg'"),
        ("vit_tiny_patch16_224", "mean", "pool is 'mean', but must be one of token, avg, max, avgmax"),
        ("vit_tinny", "avg", "unknown backbone 'vit_tinny'"),
    ],
)
def test_pooling_that_a_model_lacks_is_refused_by_name(name: str, pool: str, told: str) -> None:
    with pytest.raises(VisgraftError, match=told):
        with_pool(Backbone(name, "none"), pool)
