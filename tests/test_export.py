"""Every exported file answers as the model, in its own runtime; pictures of any size are resized as Pillow does."""

import functools
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from support import CLASSES, DEFAULTS, enliven, family, images, shallow, size_of
from test_laws import OBEYING, adapted, pictures
from torch import Tensor, nn

from visgraft import (
    Adapted,
    ExportCertificate,
    LoRAConfig,
    SCTConfig,
    attach,
    export_adapter,
    export_model,
    list_formats,
    save,
)
from visgraft.backbones.creation import Backbone, create_backbone, image_transform
from visgraft.errors import VisgraftError
from visgraft.export import proof, run
from visgraft.export.format import ExportError, Format, Subject, register_format
from visgraft.export.formats import FORMATS
from visgraft.export.graph import onnx_model
from visgraft.export.onnx import Onnx
from visgraft.export.resizing import pillow_resizes_tall_first, resize_plan
from visgraft.export.run import export_subject, make_options
from visgraft.export.samples import drawn_samples

NAMES = ["ä|b", "two\nlines", "{x}", "🚀", "e"]
ALWAYS = [
    ("sct-0", "plain"),
    ("alore-0", "swin"),
    ("alore-0", "convnext"),
]
EXPORTED = [
    pair for pair in OBEYING if (pair[1] == "plain" and pair[0] in DEFAULTS) or pair[0] in ("alore-0", "lora-0")
]
ONNX = [pair if pair in ALWAYS else pytest.param(*pair, marks=pytest.mark.long) for pair in EXPORTED]


def described(model: Any, kind: str, classes: Any = ()) -> Adapted:
    """A tiny model as `load` returns one; its facts say which images it takes."""
    made = Adapted.of(model, classes=classes)
    facts = {**made.record.data_config, "input_size": [3, size_of(kind), size_of(kind)]}
    return replace(made, record=replace(made.record, data_config=facts))


@pytest.mark.parametrize(("name", "kind"), ONNX, ids=lambda value: value)
def test_20_onnxruntime_answers_as_torch_whether_the_adapter_folds_or_not(name: str, kind: str, tmp_path: Path) -> None:
    model = shallow(name, kind)
    certificate = export_model(described(model, kind), tmp_path / "m.onnx")
    assert certificate.largest_difference <= 1e-4 * max(1.0, float(model(pictures(kind, 4)).abs().max()))
    assert certificate.agreement == 1.0 and certificate.images == 8
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = pictures(kind, count, seed=count)
        (found,) = session.run(None, {"pixels": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter on a small ViT, and a folder of pictures of mixed sizes for it."""
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    weights = root / "weights.safetensors"
    model = create_backbone(Backbone("vit_tiny_patch16_224", "none", image_size=32, arguments={"depth": 2}), 3)
    import safetensors.torch

    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights)
    model = create_backbone(Backbone("vit_tiny_patch16_224", str(weights), image_size=32, arguments={"depth": 2}), 3)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    enliven(attach(model, LoRAConfig()), strength=0.05)
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b", "c"):
            folder = root / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(5):
                height, width = generator.integers(20, 90, 2)
                cells = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(cells).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(
                    folder / f"{i}.png"
                )
    return save(model, root / "adapter", classes=["a", "b", "c"]), root / "data"


def weights_of(adapter: Path) -> str:
    return str(adapter.parent / "weights.safetensors")


def export(
    trained: tuple[Path, Path], out: Path, format: str = "onnx", data: bool = True, **options: Any
) -> dict[str, Any]:
    adapter, folder = trained
    return export_adapter(adapter, out, format, data=folder if data else None, weights=weights_of(adapter), **options)


Exported = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def exported(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The adapter in ONNX with this form of pixels, made once for the tests that only read it."""
    root = tmp_path_factory.mktemp("exported")
    return functools.cache(lambda pixels: export(trained, root / pixels / "m ä.onnx", pixels=pixels))


@pytest.mark.parametrize("pixels", ["float", "uint8", "any-size"])
def test_the_file_holds_what_its_user_has_to_know(pixels: str, exported: Exported) -> None:
    told = exported(pixels)
    out = Path(told["out"])
    assert told["source"] == "validation images" and told["images"] == 15 and told["agreement"] == 1.0
    assert json.loads(out.with_name("m ä.onnx.certificate.json").read_text())["verdict"] == told["verdict"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["m ä.onnx", "m ä.onnx.certificate.json"]
    facts = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert json.loads(facts["classes"]) == ["a", "b", "c"] and facts["task"] == "one_class"
    assert json.loads(facts["preprocessing"])["input_size"] == [3, 32, 32]
    (given,) = onnxruntime.InferenceSession(out).get_inputs()
    wanted = {
        "float": ("tensor(float)", ["batch", 3, 32, 32]),
        "uint8": ("tensor(uint8)", ["batch", 32, 32, 3]),
        "any-size": ("tensor(uint8)", ["batch", "height", "width", 3]),
    }
    assert (given.type, given.shape) == wanted[pixels]


def test_pictures_of_any_size_in_one_batch_are_answered_as_predict_does(
    trained: tuple[Path, Path], exported: Exported
) -> None:
    from visgraft import load, predict

    adapter, folder = trained
    session = onnxruntime.InferenceSession(exported("any-size")["out"])
    files = sorted((folder / "val").rglob("*.png"))
    loaded = load(adapter, weights=weights_of(adapter))
    for file, classes in zip(files, predict(loaded, files, top=3), strict=True):
        picture = np.asarray(Image.open(file).convert("RGB"))
        twice = np.stack([picture, picture[::-1]])
        logits = torch.from_numpy(session.run(None, {"picture": twice})[0])
        expected = dict(classes)
        for name, found in zip(loaded.classes, logits.softmax(1)[0].tolist(), strict=True):
            assert found == pytest.approx(expected[name], abs=1e-4)
        (alone,) = session.run(None, {"picture": twice[1:]})
        np.testing.assert_allclose(alone[0], logits[1], atol=1e-4)


class Same(nn.Module):
    """Answers with the pixels that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


SIZES = (
    (320, 240),
    (97, 211),
    (224, 224),
    (50, 40),
    (333, 500),
    (512, 128),
    (128, 512),
    (100, 501),
    (3, 7),
    (1, 30),
    (1000, 1400),
)
PLANS = [
    ("bicubic", "center", 0.9, (3, 112, 112)), ("bilinear", "squash", 1.0, (3, 98, 98)),
    ("lanczos", "border", 1.0, (3, 112, 112)), ("bicubic", "border", 1.0, (3, 98, 98)),
    ("bicubic", "squash", 0.9, (3, 112, 112)), ("bilinear", "center", 0.875, (3, 112, 112)),
    ("bilinear", "center", 1.0, (3, 96, 128)), ("bilinear", "border", 0.9, (3, 96, 128)),
]  # fmt: skip


@pytest.mark.parametrize(
    "plan", [*PLANS[:3], *(pytest.param(plan, marks=pytest.mark.long) for plan in PLANS[3:])], ids=str
)
def test_the_graph_resizes_and_crops_as_pillow_does_level_by_level(plan: Any) -> None:
    interpolation, mode, part, size = plan
    config = {
        "input_size": size, "interpolation": interpolation, "crop_mode": mode, "crop_pct": part,
        "mean": (0.2, 0.4, 0.6), "std": (1.0, 1.0, 1.0),
    }  # fmt: skip
    graph = onnx_model(Same(), config, "any-size", 20).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    steps = image_transform(config).transforms[:-2]
    generator = np.random.default_rng(0)
    for width, height in SIZES:
        for picture in (generator.integers(0, 256, (height, width, 3), dtype=np.uint8), _smooth(width, height)):
            wanted: Any = Image.fromarray(picture)
            for step in steps:
                wanted = step(wanted)
            (found,) = session.run(None, {"picture": picture[None]})
            levels = np.rint((found[0] + np.array(config["mean"])[:, None, None]) * 255).astype(int)
            off = np.abs(levels - np.asarray(wanted).astype(int).transpose(2, 0, 1))
            # Every library has a sine of its own; all else is exact.
            assert off.max() == 0 or (interpolation == "lanczos" and off.max() == 1 and (off > 0).mean() < 1e-3)


def _smooth(width: int, height: int) -> np.ndarray:
    cells = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(width))
    made = nn.functional.interpolate(cells, (height, width), mode="bicubic").clamp(0, 1)[0]
    return (made * 255).byte().movedim(0, -1).numpy()


def test_pillow_is_asked_in_which_order_it_resizes() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (300, 50, 3), dtype=np.uint8)
    whole = np.asarray(Image.fromarray(picture).resize((40, 40), Image.Resampling.BILINEAR))
    tall = (
        Image.fromarray(picture).resize((50, 40), Image.Resampling.BILINEAR).resize((40, 40), Image.Resampling.BILINEAR)
    )
    assert pillow_resizes_tall_first() == bool((np.asarray(tall) == whole).all())


@pytest.mark.parametrize(
    ("options", "smaller"),
    [
        pytest.param({"precision": "fp16"}, 0.6, marks=pytest.mark.long),
        ({"precision": "fp16", "pixels": "any-size"}, 0.7),
        ({"precision": "int8", "least_agreement": 0.5}, 0.5),
        pytest.param(
            {"precision": "int8", "least_agreement": 0.5, "quantization": "static", "pixels": "any-size"},
            0.6,
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_fewer_bits_are_measured_on_the_users_pictures(
    options: dict[str, Any], smaller: float, trained: tuple[Path, Path], exported: Exported, tmp_path: Path
) -> None:
    whole = exported("float")["bytes"]
    told = export(trained, tmp_path / "m.onnx", **options)
    assert told["bytes"] < smaller * whole and told["tolerance"] is None
    assert told["agreement"] >= told["least_agreement"] and told["accuracy"] is not None
    assert told["largest_difference"] > 0 and "demanded" in told["verdict"]


def test_a_file_that_answers_otherwise_is_not_written(
    trained: tuple[Path, Path], exported: Exported, tmp_path: Path, monkeypatch: Any
) -> None:
    out, earlier = tmp_path / "m.onnx", exported("float")["out"]
    shutil.copy(earlier, out)
    shutil.copy(f"{earlier}.certificate.json", tmp_path / "m.onnx.certificate.json")
    before = out.read_bytes()
    right = Onnx.opened.__func__  # type: ignore[attr-defined]

    def other(cls: Any, target: Path, options: Any) -> Any:
        answer = right(cls, target, options)
        return lambda samples: answer(samples) + 0.01

    monkeypatch.setattr(Onnx, "opened", classmethod(other))
    with pytest.raises(ExportError, match=r"a logit differs by .* nothing was written"):
        export(trained, out)
    monkeypatch.setattr(Onnx, "opened", classmethod(lambda cls, *given: lambda s: -right(cls, *given)(s)))
    with pytest.raises(ExportError, match=r"of the answers are the model's .* nothing was written"):
        export(trained, tmp_path / "new.onnx", precision="fp16")
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.certificate.json"]


def test_what_proves_a_graph_did_not_calibrate_it(trained: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, folder = trained
    alone = tmp_path / "alone"
    shutil.copytree(folder / "train", alone / "train")
    with pytest.raises(ExportError, match="would calibrate on the very images that prove the result"):
        export((adapter, alone), tmp_path / "m.onnx", precision="int8", quantization="static")


def test_int8_is_refused_where_most_weights_are_of_convolutions(tmp_path: Path) -> None:
    adapted = Adapted.of(attach(family("convnext_conv"), LoRAConfig()).eval())
    subject = Subject(adapted, "the model", drawn_samples(adapted.record.data_config))
    options = make_options(Onnx, {"precision": "int8", "least_agreement": 0.0})
    with pytest.raises(ExportError, match=r"would store only \d% of the weights in 8 bits.*use fp16 instead"):
        export_subject(subject, Onnx, options, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"format": "onxx"}, "unknown format 'onxx'; did you mean onnx"),
    ({"opset": 11}, "--opset is 11, but must be at least 18"),
    ({"opset": "new"}, "--opset is 'new'"),
    ({"opset": 99}, "--opset is 99, but onnx"),
    ({"precision": "int4"}, "--precision is 'int4'"),
    ({"quantization": "static"}, "--quantization has no effect without --precision int8"),
    ({"least_agreement": 0.9}, "--least-agreement has no effect on --precision fp32"),
    ({"precision": "int8", "data": False}, "add --data DIR"),
    ({"format": "timm", "opset": 20}, "--opset has no effect on the format timm; leave it out (onnx"),
    ({"out": "m.bin"}, "one file that ends in .onnx"),
    ({"out": "taken.onnx"}, "exists and is not an earlier export"),
    ({"out": "folder.onnx"}, "one file that ends in .onnx"),
    ({"out": "folder.onnx/m.onnx/m.onnx"}, "cannot be written"),
    ({"format": "timm", "out": "full"}, "not an earlier result"),
]


@pytest.mark.parametrize(("given", "told"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_and_nothing_is_written(
    given: dict[str, Any], told: str, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "taken.onnx").write_bytes(b"precious")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "folder.onnx" / "m.onnx").write_bytes(b"a file, no folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    options = {"out": "m.onnx", **given}
    with pytest.raises(VisgraftError) as caught:
        export(trained, tmp_path / options.pop("out"), **options)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "taken.onnx").read_bytes() == b"precious"


def test_an_adapter_that_does_not_fold_is_exported_as_it_is_but_not_to_timm(tmp_path: Path) -> None:
    model = described(shallow("adaptformer-0", "plain"), "plain", NAMES)
    certificate = export_model(model, tmp_path / "m.onnx")
    assert not certificate.merged and "no linear layer alone produces or reads" in str(certificate.why_not_merged)
    with pytest.raises(ExportError, match="adaptformer changes"):
        export_model(model, tmp_path / "timm", "timm")
    assert json.loads({e.key: e.value for e in onnx.load(tmp_path / "m.onnx").metadata_props}["classes"]) == NAMES


def test_a_model_that_timm_did_not_create_is_no_folder_that_timm_opens(tmp_path: Path) -> None:
    with pytest.raises(VisgraftError, match=r"this VisionTransformer has none; create it by timm\.create_model"):
        export_model(described(adapted("lora-0", "plain"), "plain"), tmp_path / "timm", "timm")
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_traced_names_the_operation(tmp_path: Path) -> None:
    model = adapted("lora-0", "plain")

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    model.norm = nn.Sequential(model.norm, Asks())
    with pytest.raises(ExportError, match="torch cannot trace VisionTransformer with any number of images"):
        export_model(described(model, "plain"), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_list_says_what_is_possible_and_why_not(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    rows = {row["format"]: row for row in list_formats(trained[0])}
    assert list(rows) == list(FORMATS) and rows["onnx"]["possible"] and rows["timm"]["possible"]
    unfolding = save(adapted("vpt_deep-0", "plain"), tmp_path / "vpt")
    config = json.loads((unfolding / "adapter_config.json").read_text())
    config["backbone"]["name"] = "vit_tiny_patch16_224"
    (unfolding / "adapter_config.json").write_text(json.dumps(config))
    rows = {row["format"]: row for row in list_formats(unfolding)}
    assert not rows["timm"]["possible"] and "inserts tokens" in rows["timm"]["why_not"]
    monkeypatch.setattr(run, "missing_packages", lambda form: ["onnxruntime"] if form is Onnx else [])
    assert {row["format"]: row for row in list_formats(trained[0])}["onnx"]["install"] == "pip install 'visgraft[onnx]'"
    with pytest.raises(
        ExportError, match=r"needs onnxruntime, which is not installed; run: pip install 'visgraft\[onnx\]'"
    ):
        export(trained, tmp_path / "m.onnx")


def test_a_format_is_one_class(trained: tuple[Path, Path], tmp_path: Path) -> None:
    @register_format("numbers")
    class Numbers(Format):
        summary, suffix = "answers as text", ".txt"

        @classmethod
        def write(cls, subject: Any, options: Any, target: Path) -> dict[str, Any]:
            target.write_text(json.dumps(proof.torch_answers(subject.model, subject.samples).tolist()))
            return {"lines": 1}

        @classmethod
        def opened(cls, target: Path, options: Any) -> Any:
            stored = torch.tensor(json.loads(target.read_text()))
            return lambda samples: stored[: len(samples)]

    try:
        with pytest.raises(VisgraftError, match="'numbers' is taken"):
            register_format("numbers")(Numbers)
        adapter = trained[0]
        model = described(adapted("lora-0", "plain"), "plain")
        certificate = export_model(model, tmp_path / "m.txt", "numbers")
        assert isinstance(certificate, ExportCertificate) and certificate.facts == {"lines": 1}
        assert "numbers" in {row["format"] for row in list_formats(adapter)}
    finally:
        del FORMATS["numbers"]


def test_models_of_other_channels_and_several_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_backbone(
        Backbone("vit_tiny_patch16_224", "none", image_size=32, arguments={"in_chans": 5, "depth": 2}), CLASSES
    )
    model = enliven(attach(model, SCTConfig(channels=8), [(torch.randn(4, 5, 32, 32), torch.tensor([0, 1, 2, 3]))]))
    for pixels in ("float", "uint8"):
        assert export_model(Adapted.of(model.eval()), tmp_path / f"{pixels}.onnx", pixels=pixels).agreement == 1.0
    with pytest.raises(ExportError, match="pictures have 3 channels, and the model takes 5"):
        export_model(Adapted.of(model), tmp_path / "any.onnx", pixels="any-size")


def test_exports_from_several_threads_are_those_of_one(tmp_path: Path) -> None:
    model = described(shallow("lora-0", "plain"), "plain")
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            export_model(model, tmp_path / f"{number}.onnx")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    x = images(2).numpy()
    answers = [onnxruntime.InferenceSession(tmp_path / f"{i}.onnx").run(None, {"pixels": x})[0] for i in range(2)]
    assert np.array_equal(answers[0], answers[1])


def test_drawn_pictures_are_those_of_the_transform() -> None:
    config = {
        "input_size": (3, 64, 64),
        "interpolation": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
        "crop_pct": 0.9,
    }
    samples = drawn_samples(config)
    assert len({samples.original(i).shape for i in range(len(samples))}) == 8 and resize_plan(config).rule == "short"
    transform = image_transform(config)
    for number, x in enumerate(samples.normalised(samples.pixels)):
        torch.testing.assert_close(x, transform(Image.fromarray(samples.original(number))))
