"""Exports for torch alone, OpenVINO and ExecuTorch: each answers as the model, in its own runtime."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEFAULTS, images
from test_laws import OBEYING, adapted, pictures

from visgraft import Adapted, ExportCertificate, export_model
from visgraft.errors import VisgraftError
from visgraft.export import run
from visgraft.export.format import ExportError
from visgraft.export.formats import FORMATS
from visgraft.export.openvino import OpenVino
from visgraft.export.torch_program import METADATA, TorchProgram

NAMES = ["ä|b", "two\nlines", "{x}'\"<&>", "🚀", "e"]
LAW_19 = [pair for pair in OBEYING if pair[0] in DEFAULTS or pair[1] == "plain"]
QUICK = (("alore-0", "plain"), ("sct-0", "mixer"))
TORCH = [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.long) for pair in LAW_19]
OTHERS = [("alore-0", "plain"), ("sct-0", "plain"), ("vpt_deep-0", "plain"), ("alore-0", "swin")]


def model_of(name: str = "lora-0", kind: str = "plain", classes: Any = ()) -> Adapted:
    return Adapted.of(adapted(name, kind), classes=classes)


def needs_executorch() -> None:
    if importlib.util.find_spec("executorch") is None:
        pytest.skip("pip install 'visgraft[executorch]' installs it; of 20 packages, so that the test extra lacks it")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportCertificate]:
    """A program of pictures of the model's size, and its certificate."""
    out = tmp_path_factory.mktemp("torch") / "m.pt2"
    return out, export_model(model_of(), out, "torch", pixels="uint8")


@pytest.mark.parametrize(("name", "kind"), TORCH, ids=lambda value: value)
def test_a_torch_program_answers_as_the_model_whether_the_adapter_folds_or_not(
    name: str, kind: str, tmp_path: Path
) -> None:
    model = model_of(name, kind)
    certificate = export_model(model, tmp_path / "m.pt2", "torch")
    assert certificate.agreement == 1.0 and certificate.computed_by.startswith("torch 2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    for count in (1, 3):
        x = pictures(kind, count, seed=count)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model.model(x), atol=1e-4, rtol=1e-4)


WITHOUT_US = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("visgraft", "timm"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
given = torch.load(sys.argv[2])
extra = {"metadata.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
with torch.inference_mode():
    found = [program(x) for x in given["images"]]
assert not {"visgraft", "timm"} & set(sys.modules)
assert json.loads(json.loads(extra["metadata.json"])["classes"]) == given["classes"]
assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, given["logits"], strict=True))
print("the same")
"""


def test_a_program_runs_where_neither_visgraft_nor_timm_is(tmp_path: Path) -> None:
    model, out = model_of("vpt_deep-0", classes=NAMES), tmp_path / 'it\'s "m" ü.pt2'
    export_model(model, out, "torch")
    inputs = [images(1), images(5)]
    with torch.no_grad():
        expected = [model.model(x) for x in inputs]
    torch.save({"images": inputs, "logits": expected, "classes": NAMES}, tmp_path / "given")
    # Isolated, so that nothing of ours is found; the environment's packages are.
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US, out, tmp_path / "given"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "the same\n", done.stderr
    with zipfile.ZipFile(out) as archive:
        assert not [name for name in archive.namelist() if archive.read(name)[:2] in (b"\x80\x02", b"PK")]  # no pickle
        texts = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".json"))
    assert b"scaled_dot_product_attention" in texts  # not taken apart: torch computes it in one step
    assert b"site-packages" not in texts and str(Path(__file__).parents[1]).encode() not in texts


def test_a_program_of_pictures_of_any_size_resizes_as_in_training(tmp_path: Path) -> None:
    certificate = export_model(model_of(), tmp_path / "m.pt2", "torch", pixels="any-size")
    assert certificate.agreement == 1.0 and certificate.tolerance is not None
    program = torch.export.load(tmp_path / "m.pt2").module()
    picture = torch.randint(0, 256, (3, 61, 40, 3), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        torch.testing.assert_close(program(picture)[1:2], program(picture[1:2]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
def test_a_program_in_half_precision_is_smaller_and_measured_and_keeps_names_that_are_not_utf_8(
    precision: str, written: tuple[Path, ExportCertificate], tmp_path: Path
) -> None:
    names, extra = ["a", "b\udcff", "c", "d", "ü"], {METADATA: ""}
    half = export_model(
        model_of(classes=names), tmp_path / "m.pt2", "torch", pixels="uint8", precision=precision, least_agreement=0.5
    )
    assert half.bytes < written[1].bytes and half.tolerance is None and half.least_agreement == 0.5
    assert written[1].largest_difference < 1e-4 < half.largest_difference
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert json.loads(json.loads(extra[METADATA])["classes"]) == names


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind"), OTHERS, ids=lambda value: value)
def test_openvino_answers_as_the_model_and_tells_nobody(name: str, kind: str, tmp_path: Path) -> None:
    model, out = model_of(name, kind, NAMES), tmp_path / 'it\'s "m" ü'
    certificate = export_model(model, out, "openvino")
    assert certificate.agreement == 1.0 and certificate.computed_by.startswith("openvino 2")
    assert sorted(path.name for path in out.iterdir()) == ["certificate.json", "model.bin", "model.xml"]
    assert "openvino_telemetry" not in sys.modules
    import openvino

    opened = openvino.Core().read_model(out / "model.xml")
    assert json.loads(opened.get_rt_info(["visgraft", "classes"]).value) == NAMES
    compiled = openvino.compile_model(opened, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 3):
        x = pictures(kind, count, seed=count)
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(compiled(x.numpy())[0]), model.model(x), atol=1e-4, rtol=1e-4)
    half = export_model(model, out, "openvino", precision="fp16", pixels="uint8", least_agreement=0.5)
    assert half.bytes < certificate.bytes and half.tolerance is None


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind"), [("alore-0", "plain"), ("vpt_deep-0", "plain"), ("sct-0", "convnext")])
def test_executorch_answers_as_the_model(name: str, kind: str, tmp_path: Path) -> None:
    needs_executorch()
    model = model_of(name, kind, NAMES)
    certificate = export_model(model, tmp_path / "m ü.pte", "executorch", most_images=3)
    assert certificate.agreement == 1.0 and certificate.computed_by.startswith("executorch ")
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(tmp_path / "m ü.pte")
    (told,) = program.load_method("metadata").execute([])
    assert json.loads(json.loads(told)["classes"]) == NAMES
    with torch.no_grad():
        for count in (1, 3):
            x = pictures(kind, count, seed=count)
            (found,) = program.load_method("forward").execute([x])
            torch.testing.assert_close(found, model.model(x), atol=1e-4, rtol=1e-4)


BAD: list[tuple[str, str, dict[str, Any], str]] = [
    ("openvino", "m", {"pixels": "any-size"}, "cannot be written as openvino: OpenVINO computes float64 in float32"),
    ("openvino", "m", {"pixels": "bytes"}, "--pixels is 'bytes'"),
    ("openvino", "m", {"precision": "int8"}, "--precision is 'int8'"),
    ("openvino", "m", {"opset": "20"}, "--opset has no effect on the format openvino"),
    ("executorch", "m.pte", {"pixels": "any-size"}, "cannot be written as executorch: ExecuTorch sets memory aside"),
    ("executorch", "m.pte", {"most_images": "1"}, "--most-images is 1, but must be at least 2"),
    ("executorch", "m.pte", {"precision": "fp16"}, "--precision has no effect on the format executorch"),
    ("torch", "m.pt2", {"precision": "int8"}, "--precision is 'int8'"),
    ("torch", "m.pt2", {"least_agreement": "0.9"}, "--least-agreement has no effect on --precision fp32"),
    ("torch", "m.pt2", {"precision": "bf16", "least_agreement": "2"}, "must be between 0 and 1"),
    ("torch", "m.pt", {}, "one file that ends in .pt2"),
    ("torch", "taken.pt2", {}, "exists and is not an earlier export"),
    ("torch", "taken.pt2/m.pt2", {}, "cannot be written"),
    ("torch", f"{'n' * 230}.pt2", {}, "cannot be written"),
    ("torch", "hf://owner/m.pt2", {}, "is a name on the hub"),
]


@pytest.mark.parametrize(("format", "out", "options", "told"), BAD, ids=lambda value: str(value)[:30])
def test_what_cannot_be_is_one_line_before_anything_is_computed(
    format: str, out: str, options: dict[str, Any], told: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(run, "missing_packages", lambda form: [])
    monkeypatch.setattr(run, "export_subject", lambda *given: pytest.fail("it began"))
    (tmp_path / "taken.pt2").write_bytes(b"precious")
    with pytest.raises(VisgraftError) as caught:
        export_model(model_of(), out if "://" in out else tmp_path / out, format, **options)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.pt2"]


@pytest.mark.parametrize(("format", "out"), [("openvino", "m"), ("executorch", "m.pte")])
def test_a_missing_package_is_named_with_what_installs_it(
    format: str, out: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, format, None)
    told = rf"needs {format}, which is not installed; run: pip install 'visgraft\[{format}\]'"
    with pytest.raises(ExportError, match=told):
        export_model(model_of(), tmp_path / out, format)


@pytest.mark.parametrize(
    "format", ["torch", *(pytest.param(other, marks=pytest.mark.long) for other in ("openvino", "executorch"))]
)
def test_a_damaged_file_is_one_line(format: str, written: tuple[Path, ExportCertificate], tmp_path: Path) -> None:
    if format == "executorch":
        needs_executorch()
    form = FORMATS[format]
    target = tmp_path / f"m{form.suffix}"
    if format == "torch":
        shutil.copy(written[0], target)
    else:
        export_model(model_of(), target, format)
    file = target if form.suffix else target / "model.bin"
    whole = file.read_bytes()
    for damaged in (b"", b"not what it says", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ExportError, match="does not open the exported") as caught:
            form.opened(target, form.Options())
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a process's files")
@pytest.mark.parametrize("format", ["torch", pytest.param("openvino", marks=pytest.mark.long)])
def test_where_a_file_does_not_fit_nothing_is_left(format: str, tmp_path: Path) -> None:
    """Torch's own writer would end this process here."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60000, hard))
    try:
        with pytest.raises(VisgraftError, match="cannot be written") as caught:
            export_model(model_of(), tmp_path / f"m{FORMATS[format].suffix}", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_of_two_exports_to_one_file_one_is_there_with_its_own_certificate(tmp_path: Path, monkeypatch: Any) -> None:
    replace = os.replace

    def work(number: int) -> None:
        with run._writing(tmp_path / "m.pt2", TorchProgram) as target:
            target.write_text(str(number))
            target.with_name("m.pt2.certificate.json").write_text(str(number))

    other = threading.Thread(target=work, args=(2,))

    def in_between(*given: Any) -> None:
        replace(*given)
        if other.ident is None:  # the first one's file is in place, but not its certificate
            other.start()
            other.join(0.3)

    monkeypatch.setattr(os, "replace", in_between)
    work(1)
    other.join()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"m.pt2": "2", "m.pt2.certificate.json": "2"}


def test_of_exports_to_one_folder_one_is_there_whole(tmp_path: Path) -> None:
    def work(number: int) -> None:
        for _ in range(10):
            with run._writing(tmp_path / "m", OpenVino) as folder:
                (folder / "model.xml").write_text(str(number))
                (folder / "certificate.json").write_text(str(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "model.xml").read_text() == (tmp_path / "m" / "certificate.json").read_text()
