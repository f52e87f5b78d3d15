"""Checks that take minutes, for `make test-all`: inductor, and every method on backbones of full size."""

import pytest
import timm
import torch
from support import CONFIGS, DEFAULTS, fitted, gradients, images, logits, size_of

from visgraft import count_parameters, list_methods
from visgraft.core.attach import assemble, detach
from visgraft.errors import SiteError
from visgraft.export.merge import why_not_merged

pytestmark = pytest.mark.long

BACKBONES = [
    "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224", "deit3_base_patch16_224",
    "deit_base_distilled_patch16_224", "vit_giant_patch14_reg4_dinov2", "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224", "vit_base_patch16_dinov3", "vit_pe_core_base_patch16_224",
    "beit_large_patch16_224", "beitv2_base_patch16_224", "eva02_small_patch14_224", "eva02_large_patch14_224",
    "swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224", "swin_large_patch4_window12_384",
    "swinv2_base_window8_256", "convnext_base", "convnext_large_mlp", "convnextv2_base", "mixer_b16_224",
    "mixer_l16_224", "resmlp_24_224", "as_mlp_base_patch4_shift5_224",
]  # fmt: skip


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_method_attaches_to_full_sizes_or_says_why_not(backbone: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(backbone, num_classes=10)
    total = sum(p.numel() for p in model.parameters())
    refused = []
    for name in DEFAULTS:
        config = CONFIGS[name]
        try:
            assemble(model, config)
        except SiteError as error:
            refused.append(config.method)
            assert "use other options" in str(error) or "leave" in str(error)
            continue
        count = count_parameters(model)
        small = bool(list_methods()[config.method].placements(config))
        assert count.adapter < (0.05 * total if small else total), name
        detach(model)
        why_not_merged(model, config)
    assert set(refused) <= {"vpt_shallow", "vpt_deep", "fact"}


@pytest.mark.parametrize(
    ("name", "kind"), [("sct-0", "plain"), ("alore-0", "swin"), ("lora-0", "plain"), ("lora-0", "convnext")]
)
def test_inductor_compiles_it_with_the_same_answers_and_gradients(name: str, kind: str) -> None:
    torch._dynamo.reset()
    model, x = fitted(CONFIGS[name], kind), images(size=size_of(kind))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, x), logits(model, x), rtol=1e-4, atol=1e-5)
    model.double()
    torch.testing.assert_close(gradients(compiled, model, x.double()), gradients(model, model, x.double()))
