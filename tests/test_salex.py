"""The experiment on salient experts, in a process of its own, because importing it registers a method."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import torch
from salient_experts import SalexConfig
from support import batches, enliven, family, images, logits, vit
from visgraft import ALoREConfig, attach, count_parameters, merge
from visgraft.core.attach import get_attached

torch.manual_seed(0)
whole = attach(vit(), SalexConfig(channels=32, rank=2), batches())
alore = attach(vit(), ALoREConfig(rank=2))
assert count_parameters(whole).adapter == count_parameters(alore).adapter
enliven(alore)
own = {name: tensor for name, tensor in alore.state_dict().items() if name in whole.state_dict()}
whole.load_state_dict(own, strict=False)
torch.testing.assert_close(logits(whole), logits(alore))

for form, count in (("square", 16), ("read", 40), ("write", 40)):
    config = SalexConfig(form=form, channels=8, rank=2, experts=2)
    model = attach(vit(), config, batches())
    assert torch.equal(logits(model), logits(vit()))
    per_place = {"square": 2 * 8, "read": 8 + 32, "write": 32 + 8}[form] * 2
    assert count_parameters(model).adapter == 3 * 2 * per_place + 2**3
    enliven(model).double()
    before, (merged, _) = logits(model, images(4).double()), merge(model, images(4).double())
    assert (logits(merged, images(4).double()) - before).abs().max() <= 1e-9 * before.abs().max()
    for module in get_attached(model).positions.values():
        x = images(2, size=16).double()[:, :1, :, :].reshape(2, 8, 32)
        whole_delta = module.delta(x, None)
        parts = sum(module.part_delta(x, index) for index in range(2))
        torch.testing.assert_close(parts, whole_delta)
print("fine")
"""


def test_salient_experts_are_alore_where_all_channels_are_chosen_and_merge_in_all_forms() -> None:
    command = [sys.executable, "-c", CODE, str(ROOT / "benchmarks"), str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
