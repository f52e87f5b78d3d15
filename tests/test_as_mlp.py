"""AS-MLP: the shift by hand, the published sizes, and what timm's models do."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from support import family, images
from torch.utils.flop_counter import FlopCounterMode

from visgraft import VisgraftError, attach, count_parameters, list_methods
from visgraft.backbones.as_mlp import AxialShiftedBlock, shift_groups
from visgraft.backbones.creation import Backbone, create_backbone
from visgraft.core import families
from visgraft.core.sites import Neighbour


@pytest.mark.parametrize("channels", [10, 13])
@pytest.mark.parametrize("dim", [2, 3])
def test_each_part_of_the_channels_moves_by_its_own_distance(channels: int, dim: int) -> None:
    x = torch.randn(2, channels, 6, 7)
    moved, width = shift_groups(x, 5, dim), -(-channels // 5)
    for channel in range(channels):
        by = channel // width - 2
        for place in range(x.shape[dim]):
            found = moved[:, channel].select(dim - 1, place)
            inside = 0 <= place - by < x.shape[dim]
            wanted = x[:, channel].select(dim - 1, place - by) if inside else torch.zeros_like(found)
            assert torch.equal(found, wanted)


# Table 1 of the paper: millions of parameters, and operations in units of 10^9, additions and norms among them.
PUBLISHED = {"tiny": (28, 4.4), "small": (50, 8.5), "base": (88, 15.2)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_are_the_published_ones(size: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"as_mlp_{size}_patch4_shift5_224").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    millions, operations = PUBLISHED[size]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert counter.get_total_flops() / 2e9 == pytest.approx(operations, rel=0.02)


def test_alore_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = timm.create_model("as_mlp_base_patch4_shift5_224", num_classes=100)
    attach(model, list_methods()["alore"].Config())
    assert count_parameters(model).adapter == 192_576


def test_any_size_goes_in_and_what_timm_asks_of_a_model_works() -> None:
    model = create_backbone(Backbone("as_mlp_tiny_patch4_shift5_224", "none", 44), 5).eval()
    x = torch.randn(2, 3, 44, 68)  # 11 × 17 patches, then 6 × 9, 3 × 5 and 2 × 3
    features = model.forward_features(x)  # type: ignore[operator]
    assert features.shape == (2, 768, 2, 3) and model.forward_head(features, pre_logits=True).shape == (2, 768)  # type: ignore[operator]
    stages = timm.create_model("as_mlp_tiny_patch4_shift5_224", features_only=True)
    sizes = [(f.shape[1], 64 // f.shape[2]) for f in stages(torch.randn(1, 3, 64, 64))]
    assert sizes == list(zip(stages.feature_info.channels(), stages.feature_info.reduction(), strict=True))
    model.reset_classifier(3, "max")  # type: ignore[operator]
    assert model(x).shape == (2, 3) and model.get_classifier() is model.head  # type: ignore[operator]


def test_gradient_checkpointing_changes_no_number() -> None:
    model, x = family("as_mlp"), images(2, size=32)
    gradients = []
    for wanted in (False, True):
        model.set_grad_checkpointing(wanted)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize(
    ("site", "change"),
    [
        ("attn.in", {"feeds": (Neighbour("{}.axial_shift.conv2_1"),)}),
        ("attn.out", {"produced_by": Neighbour("{}.axial_shift.conv2_2")}),
    ],
)
def test_a_row_that_crosses_the_shift_is_refused(
    site: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crossing(block: Any, path: str, *rest: Any) -> list[Any]:
        def there(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(there, value))
            return replace(value, path=value.path.format(path))

        found = families._axial_block(block, path, *rest)
        return [replace(s, **{k: there(v) for k, v in change.items()}) if s.name == site else s for s in found]

    monkeypatch.setitem(families.BLOCKS, AxialShiftedBlock, crossing)
    config = list_methods()["alore"].Config(places=(site, "mlp.in"))
    with pytest.raises(VisgraftError, match=f"the site {site} of block 0 .* does not carry the tensor of"):
        attach(family("as_mlp"), config)
