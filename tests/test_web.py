"""The folder that answers in a browser: what it holds, and, in headless Chromium, that it answers as predict does."""

import io
import json
import re
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from browser import CHROMIUM, Page, browser, served
from PIL import Image
from safetensors.numpy import load_file
from test_export import export, trained, weights_of

from visgraft import attach, load, predict
from visgraft.adapters.directory import save
from visgraft.data.decode import open_image
from visgraft.export import web_runtime
from visgraft.export.format import ExportError
from visgraft.export.onnx import save_proto
from visgraft.export.web import PAGE, answers_of_folder, check_picture, stored_in_half
from visgraft.export.web_runtime import WASM, WEBGPU, write_runtime

__all__ = ["trained"]  # a fixture
NAMES = ["<img src=x onerror=alert(1)>", "two\nlines 🚀", "a" * 80, "ä|b"]


def fake_runtime(folder: Path, files: tuple[str, ...] = (*WASM, *WEBGPU)) -> Path:
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": "9.9.9"}))
    for name in files:
        (folder / "dist" / name).write_text(name)
    return folder


def casts_to_float64(graph: onnx.GraphProto) -> bool:
    kinds = {value.i for node in graph.node for value in node.attribute if node.op_type == "Cast"}
    return onnx.TensorProto.DOUBLE in kinds | {tensor.data_type for tensor in graph.initializer}


def other_task(adapter: Path, out: Path) -> Path:
    """Save another adapter of the same backbone and method, of four classes with unusual names."""
    from support import enliven

    from visgraft.backbones.creation import create_backbone

    adapted = load(adapter, weights=weights_of(adapter))
    torch.manual_seed(1)
    model = create_backbone(replace(adapted.record.backbone, weights=weights_of(adapter)), len(NAMES))
    enliven(attach(model, adapted.record.method), seed=1, strength=0.05)
    with torch.no_grad():
        model.head.weight.normal_(std=0.3)  # type: ignore[union-attr, operator]
    return save(model, out, classes=NAMES)


@pytest.fixture(scope="module")
def folders(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An export of one adapter, another with a second one added, and the stand-in for onnxruntime-web."""
    root = tmp_path_factory.mktemp("web")
    fake = fake_runtime(root / "package")
    export(trained, root / "one", "web", precision="fp32", runtime=str(fake), name="first")
    second = other_task(trained[0], trained[0].parent / "other")
    export(
        (second, trained[1]), root / "both", "web", False, precision="fp32", runtime=str(fake), name="zweite-ü",
        base=str(root / "one"),
    )  # fmt: skip
    return root / "one", root / "both", fake


def test_the_folder_holds_all_that_the_page_asks_for_and_nothing_from_elsewhere(
    folders: tuple[Path, Path, Path],
) -> None:
    one, both, _ = folders
    top = {"backbone.onnx", "resize.onnx", "adapters.json", "check.png", "certificate.json", "runtime", *PAGE}
    assert {path.name for path in one.iterdir()} == top | {"first.safetensors"}
    assert {path.name for path in both.iterdir()} == top | {"first.safetensors", "zweite-ü.safetensors"}
    assert {path.name for path in (one / "runtime").iterdir()} == {*WASM, *WEBGPU, "LICENSE"}
    assert "Microsoft" in (one / "runtime" / "LICENSE").read_text()
    for name in ("backbone.onnx", "resize.onnx"):
        assert (one / name).read_bytes() == (both / name).read_bytes()
    # Kernels for WebGPU know no float64, and nothing of it must come back into the backbone.
    doubles = {name for name in ("backbone", "resize") if casts_to_float64(onnx.load(one / f"{name}.onnx").graph)}
    assert doubles == {"resize"}
    text = "".join((one / name).read_text() for name in PAGE)
    assert "innerHTML" not in text and set(re.findall(r"https?://[^\s\"']+", text)) == {"http://localhost:8000."}
    for name in re.findall(r'(?:href|src)="([^"#:]+)"', (one / "index.html").read_text()):
        assert (one / name).is_file(), name


def test_each_adapter_is_plain_inputs_and_answers_as_predict_on_pictures_as_they_are(
    folders: tuple[Path, Path, Path], trained: tuple[Path, Path]
) -> None:
    _, both, _ = folders
    about = json.loads((both / "adapters.json").read_text())
    assert about["page"]["onnxruntime_web"] == "9.9.9" and about["adapters"]["zweite-ü"]["classes"] == NAMES
    graph = onnx.load(both / "backbone.onnx").graph
    inputs = {value.name for value in graph.input}
    assert not inputs & {tensor.name for tensor in graph.initializer}
    files = sorted((trained[1] / "val").rglob("*.png"))[:5]
    for adapter, facts in zip((trained[0], trained[0].parent / "other"), about["adapters"].values(), strict=True):
        tensors = load_file(both / facts["file"])
        assert set(tensors) | {"pixels"} == inputs and facts["bytes"] == (both / facts["file"]).stat().st_size
        assert facts["background_rgb"] == [255, 255, 255] and len(facts["check"]) == facts["outputs"]
        answer = answers_of_folder(both, both / facts["file"])
        np.testing.assert_allclose(answer(check_picture()[None])[0], facts["check"], rtol=1e-5, atol=1e-5)
        loaded = load(adapter, weights=weights_of(adapter))
        for file, named in zip(files, predict(loaded, files, top=9), strict=True):
            logits = torch.from_numpy(answer(np.asarray(open_image(file))[None]))[0]
            found = dict(zip(loaded.classes, logits.softmax(0).tolist(), strict=True))
            assert found == pytest.approx(dict(named), abs=1e-4)


def test_weights_in_half_take_half_the_place_and_answer_alike(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    one = folders[0]
    for name in ("first.safetensors", "resize.onnx"):
        shutil.copyfile(one / name, tmp_path / name)
    save_proto(stored_in_half(onnx.load(one / "backbone.onnx")), tmp_path / "backbone.onnx")
    assert (tmp_path / "backbone.onnx").stat().st_size < 0.6 * (one / "backbone.onnx").stat().st_size
    whole, half = (answers_of_folder(at, at / "first.safetensors") for at in (one, tmp_path))
    picture = check_picture()[None]
    assert 0 < np.abs(whole(picture) - half(picture)).max() < 0.02


def test_bad_input_is_one_line(
    folders: tuple[Path, Path, Path], trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _, fake = folders
    other = tmp_path / "other"
    other.mkdir()
    (other / "package.json").write_text('["onnxruntime-web"]')
    earlier = shutil.copytree(one, tmp_path / "earlier")
    (earlier / "resize.onnx").unlink()
    (tmp_path / "broken.tgz").write_bytes(b"\x1f\x8b\x08 no archive")
    bad: list[tuple[dict[str, Any], str]] = [
        ({"runtime": str(tmp_path / "nowhere")}, "cannot be read as the npm package"),
        ({"runtime": str(tmp_path / "broken.tgz")}, "cannot be read as the npm package"),
        ({"runtime": str(other)}, "is not the npm package onnxruntime-web"),
        ({"runtime": str(fake_runtime(tmp_path / "old", WASM[:1]))}, f"9.9.9 without {WASM[1]}"),
        ({"precision": "int8"}, "add --data DIR"),
        ({"name": "../evil"}, "must be letters, digits"),
        ({"base": str(one)}, "its precision is another"),
        ({"base": str(one), "precision": "fp32", "name": "first"}, "has an adapter 'first' already"),
        ({"base": str(earlier), "precision": "fp32"}, "has no resize.onnx: an earlier visgraft wrote it"),
        ({"base": str(tmp_path)}, "which is no export of the format web"),
        ({"pixels": "uint8"}, "--pixels has no effect on the format web"),
    ]
    for given, told in bad:
        with pytest.raises(ExportError) as caught:
            export(trained, tmp_path / "out", "web", False, **{"runtime": str(fake), **given})
        assert told in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_the_runtime_is_downloaded_once_and_only_as_it_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISGRAFT_CACHE", str(tmp_path / "cache"))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(fake_runtime(tmp_path / "package"), "package")
    calls: list[str] = []

    def answering(address: str, timeout: float) -> io.BytesIO:
        calls.append(address)
        return io.BytesIO(packed.getvalue())

    monkeypatch.setattr(urllib.request, "urlopen", answering)
    with pytest.raises(ExportError, match="its sha512 is another"):
        write_runtime(None, tmp_path / "a")
    monkeypatch.setattr(web_runtime, "SHA512", web_runtime._digest(packed.getvalue()))
    for name in ("b", "c"):
        assert write_runtime(None, tmp_path / name)["onnxruntime_web"] == "9.9.9"
        assert (tmp_path / name / WASM[2]).read_text() == WASM[2]
    assert len(calls) == 2

    def offline(address: str, timeout: float) -> io.BytesIO:
        raise urllib.error.URLError("no network")

    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(ExportError, match=r"npm pack onnxruntime-web@\S+ elsewhere and name the file by --runtime"):
        write_runtime(None, tmp_path / "d")


@pytest.fixture(scope="module")
def real_runtime() -> str | None:
    """Skip where there is no Chromium, or onnxruntime-web is not to be had."""
    if CHROMIUM is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    try:
        return str(web_runtime._cached())
    except ExportError as error:
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(str(error))


def photographs(folder: Path) -> list[Path]:
    """Write two photographs in many sizes and ways of storing."""
    from sklearn.datasets import load_sample_image

    folder.mkdir()
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    generator = np.random.default_rng(0)
    made = []
    for i in range(20):
        photo = photos[i % 2]
        width, height = (int(side) for side in generator.integers(40, 420, 2))
        left, top = int(generator.integers(0, 640 - width)), int(generator.integers(0, 427 - min(height, 426)))
        piece = photo.crop((left, top, left + width, min(top + height, 427)))
        file = folder / f"{i}.{('jpg', 'png', 'webp', 'bmp')[i % 4]}"
        piece.save(file, **({"lossless": True} if i % 4 == 2 else {"quality": 90} if i % 4 == 0 else {}))
        made.append(file)
    for turn in (3, 6, 8, 5):
        exif = Image.Exif()
        exif[274] = turn
        photos[1].resize((200, 130)).save(folder / f"turned {turn}.jpg", exif=exif, quality=95)
        made.append(folder / f"turned {turn}.jpg")
    photos[0].resize((1600, 1067)).save(folder / "large.jpg", quality=90)
    photos[0].convert("L").save(folder / "grey <b>&amp; 50%41#?.png")
    clear = photos[1].convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    return [*made, folder / "large.jpg", folder / "grey <b>&amp; 50%41#?.png", folder / "clear.png"]


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.mark.long
@pytest.mark.parametrize("isolated", [False, True])
def test_chromium_answers_photographs_as_predict_and_swaps_adapters(
    isolated: bool, folders: tuple[Path, Path, Path], trained: tuple[Path, Path], real_runtime: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[1], tmp_path / "site")
    shutil.rmtree(folder / "runtime")
    write_runtime(real_runtime, folder / "runtime")
    files = photographs(tmp_path / "photos")
    with served(folder, isolated) as address, browser() as page:
        assert page.open(address) == "ready"
        assert (page.evaluate("model.graphs.threads") > 1) == isolated
        for number, adapter in enumerate((trained[0], trained[0].parent / "other")):
            page.evaluate(f"at('adapter').selectedIndex = {number}; at('adapter').dispatchEvent(new Event('change'))")
            loaded = load(adapter, weights=weights_of(adapter))
            for file, named in zip(files, predict(loaded, files, top=9), strict=True):
                answer = page.choose(file)
                assert "error" not in answer, answer
                found = dict(zip(loaded.classes, answer["probabilities"], strict=True))
                assert max(found, key=found.__getitem__) == named[0][0], file.name
                # Half transparent places are mixed in whole levels, by a browser to another side than by Pillow.
                assert found == pytest.approx(dict(named), abs=0.02 if file.name == "clear.png" else 1e-3), file.name
            assert page.evaluate("model.difference") < 1e-4 and page.evaluate("at('warning').hidden")
            shown = page.evaluate("[...document.querySelectorAll('#answers .name')].map((e) => e.textContent)")
            assert set(shown) == set(loaded.classes) and page.evaluate("document.images.length") == 1
        loads = [said for said in page.said if '"request"' in said and '"type": "Fetch"' in said]
        assert sum("backbone.onnx" in said for said in loads) == 1
        assert page.evaluate("at('device').textContent") == "Runs on the CPU." and not any(
            "jspi" in said for said in loads
        )
        asked = {json.loads(said)["request"]["url"] for said in page.said if '"request"' in said}
        assert all(url.startswith((address, "blob:", "data:")) for url in asked), asked


@pytest.mark.long
def test_the_page_says_what_is_wrong(
    folders: tuple[Path, Path, Path], real_runtime: str, tmp_path: Path, tab: Page
) -> None:
    folder = shutil.copytree(folders[0], tmp_path / "site")
    shutil.rmtree(folder / "runtime")
    write_runtime(real_runtime, folder / "runtime")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    line = tmp_path / "line.png"
    Image.new("RGB", (2000, 2)).save(line)
    about = json.loads((folder / "adapters.json").read_text())
    with served(folder) as address:
        assert tab.open(address) == "ready"
        assert "no picture that the browser can read" in tab.choose(broken)["error"]
        assert "500 times as long as wide" in tab.choose(line)["error"]
        assert "error" not in tab.choose(folder / "check.png")
        about["adapters"]["first"]["check"][0] += 1
        (folder / "adapters.json").write_text(json.dumps(about))
        tab.call("Network.setCacheDisabled", cacheDisabled=True)
        assert tab.open(address + "?again") == "ready"
        assert "Do not rely on these answers" in tab.evaluate("document.body.innerText")
        (folder / "backbone.onnx").unlink()
        assert tab.open(address + "?lacking") == "failed"
        assert "copy the whole folder" in tab.evaluate("document.body.innerText")
    assert tab.open((folder / "index.html").as_uri()) == "failed"
    assert "Serve the folder" in tab.evaluate("document.body.innerText")


@pytest.mark.long
@pytest.mark.parametrize(("precision", "most"), [("fp16", 1e-3), ("int8", 0.1)])
def test_chromium_answers_as_onnxruntime_in_other_precisions(
    precision: str, most: float, trained: tuple[Path, Path], real_runtime: str, tmp_path: Path, tab: Page
) -> None:
    folder = tmp_path / "site"
    export(trained, folder, "web", precision=precision, least_agreement=0.5, runtime=real_runtime)
    answer = answers_of_folder(folder, folder / "adapter.safetensors")
    with served(folder) as address:
        assert tab.open(address) == "ready"
        for file in photographs(tmp_path / "photos")[:20]:
            expected = torch.from_numpy(answer(np.asarray(open_image(file))[None]))[0].softmax(0).tolist()
            assert tab.choose(file)["probabilities"] == pytest.approx(expected, abs=most), file.name
