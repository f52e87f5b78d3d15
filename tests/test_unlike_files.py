"""The file by which an adapter tells unlike pictures, where it is odd, and levels that no file can tell."""

# ruff: noqa: F401, F811  (fixtures are imported here, and then named as arguments)

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from serving import running
from test_trust import gauges, images_of, trained

from visgraft import predict_stream
from visgraft.adapters.directory import CONFIG
from visgraft.adapters.hub import UNLIKE
from visgraft.adapters.reference import digest_of_reference, parse_reference
from visgraft.errors import AdapterError
from visgraft.serve.unlike import check_level


def with_reference(trained: Path, target: Path, content: bytes) -> Path:
    """Copy an adapter that says of this file that it was saved with it."""
    shutil.copytree(trained, target)
    before = digest_of_reference((target / UNLIKE).read_bytes())
    facts = (target / CONFIG).read_text(encoding="utf-8")
    assert before in facts
    (target / CONFIG).write_text(facts.replace(before, digest_of_reference(content)), encoding="utf-8")
    (target / UNLIKE).write_bytes(content)
    return target


def test_a_reference_of_other_features_is_refused(gauges: Path, trained: Path, tmp_path: Path) -> None:
    """By name, where numpy would tell of shapes, also by a server, which answers without marks all the same."""
    tensors = safetensors.torch.load((trained / UNLIKE).read_bytes())
    few = {"mean": tensors["mean"][:5].clone(), "directions": tensors["directions"][:, :5].clone()}
    other = with_reference(trained, tmp_path / "other", safetensors.torch.save({**tensors, **few}))
    says = f"other cannot tell unlike pictures: its {UNLIKE} is of 5 features, but the backbone gives 64"
    picture = images_of(gauges)[0]
    with pytest.raises(AdapterError, match=re.escape(says)):
        list(predict_stream([other], [picture], unlike=0.1))
    with running(tmp_path / "store", {"other": other}) as served:
        status, found, _ = served.send("/predict?unlike=0.1", picture)
        assert status == 422 and says in found["error"]
        assert served.send("/predict", picture)[0] == 200


@pytest.mark.parametrize(("dtype", "wide"), [("F4", 2), ("F8_E8M0", 4)])
def test_a_reference_of_a_type_that_torch_lacks_is_damaged(dtype: str, wide: int) -> None:
    head = json.dumps({"mean": {"dtype": dtype, "shape": [4], "data_offsets": [0, wide]}}).encode()
    head += b" " * (-len(head) % 8)
    with pytest.raises(SafetensorError, match=f"of a type that cannot be read, {dtype}"):
        parse_reference(len(head).to_bytes(8, "little") + head + bytes(wide))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8])
def test_a_reference_of_other_numbers_is_damaged(trained: Path, dtype: torch.dtype) -> None:
    """Of complex numbers torch would take the real part."""
    tensors = safetensors.torch.load((trained / UNLIKE).read_bytes())
    with pytest.raises(ValueError, match="its numbers are of another type"):
        parse_reference(safetensors.torch.save({**tensors, "mean": tensors["mean"].to(dtype)}))


@pytest.mark.parametrize("level", [1e-320, 1e-9, 0.00049])
def test_a_level_below_all_that_can_be_told_says_so(level: float) -> None:
    with pytest.raises(AdapterError, match=r"no more than 2,000 validation images .* a level of 0\.0005 or more"):
        check_level(level, "a", 2000)
    check_level(0.0005, "a", 2000)
