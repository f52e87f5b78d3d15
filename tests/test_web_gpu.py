"""The folder in the browser on WebGPU, in software where there is no GPU: answers, and when the CPU takes over."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browser, served
from test_export import trained, weights_of
from test_web import folders, photographs, real_runtime

from visgraft import load, predict
from visgraft.export.web import files_for
from visgraft.export.web_runtime import WASM, write_runtime

__all__ = ["folders", "real_runtime", "trained"]  # fixtures
SOFTWARE = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
# A GPU in software is passed over but where it is asked for, so that it has to be told as a real one.
REAL = "Object.defineProperty(GPUAdapterInfo.prototype, 'isFallbackAdapter', {value: false});"
WRONG = """const mapped = GPUBuffer.prototype.getMappedRange;
GPUBuffer.prototype.getMappedRange = function (...given) {
  const found = mapped.apply(this, given);
  if (this.usage & GPUBufferUsage.MAP_READ) new Float32Array(found).forEach((x, i, all) => { all[i] = 1.1 * x + 0.1; });
  return found;
};"""
DEVICES = """window.devices = [];
const asked = GPUAdapter.prototype.requestDevice;
GPUAdapter.prototype.requestDevice = async function (...given) {
  const device = await asked.apply(this, given);
  devices.push(device);
  return device;
};"""
LOSING = """const run = model.graphs.backbone.run.bind(model.graphs.backbone);
model.graphs.backbone.run = (feeds) => {
  const made = run(feeds);
  devices.at(-1).destroy();
  return made;
}; 0"""
LOST = "devices.at(-1).destroy(); 0"
ERROR = "devices.at(-1).createBuffer({size: 16, usage: 0xffff}); 0"
NONE = "Object.defineProperty(Navigator.prototype, 'gpu', {value: undefined});"
NULL = "GPU.prototype.requestAdapter = async () => null;"
NO_JSPI = "delete WebAssembly.Suspending;"


@pytest.fixture(scope="module")
def site(
    folders: tuple[Path, Path, Path], real_runtime: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """The export of two adapters with the real onnxruntime-web, and its address."""
    folder = shutil.copytree(folders[1], tmp_path_factory.mktemp("site") / "site")
    shutil.rmtree(folder / "runtime")
    write_runtime(real_runtime, folder / "runtime")
    with served(folder) as address:
        yield folder, address


@pytest.fixture
def tab(site: tuple[Path, str]) -> Iterator[Page]:
    with browser(*SOFTWARE) as page:
        page.call("Page.navigate", url=site[1] + "style.css")  # of an origin that is secure
        if not page.evaluate("(async () => Boolean(await navigator.gpu?.requestAdapter()))()"):
            pytest.skip("this chromium offers no WebGPU adapter, not in software either")
        yield page


def opened(tab: Page, address: str, *scripts: str) -> str:
    """Open the page after these scripts; returns the text of the line that says what computes."""
    tab.call("Page.addScriptToEvaluateOnNewDocument", source="".join(f"{{{script}}}" for script in scripts))
    assert tab.open(address) == "ready", tab.evaluate("document.body.innerText")
    return str(tab.evaluate("at('device').textContent"))


def asked_for(tab: Page, name: str) -> bool:
    return any(name in said for said in tab.said if '"request"' in said)


@pytest.mark.long
def test_webgpu_answers_photographs_as_predict_and_swaps_adapters(
    site: tuple[Path, str], trained: tuple[Path, Path], tmp_path: Path, tab: Page
) -> None:
    files = photographs(tmp_path / "photos")
    assert opened(tab, site[1] + "?device=webgpu") == "Runs on WebGPU."
    for number, adapter in enumerate((trained[0], trained[0].parent / "other")):
        tab.evaluate(f"at('adapter').selectedIndex = {number}; at('adapter').dispatchEvent(new Event('change'))")
        loaded = load(adapter, weights=weights_of(adapter))
        for file, named in zip(files, predict(loaded, files, top=9), strict=True):
            answer = tab.choose(file)
            assert answer.get("device") == "webgpu", answer
            found = dict(zip(loaded.classes, answer["probabilities"], strict=True))
            assert max(found, key=found.__getitem__) == named[0][0], file.name
            # As on the CPU; half transparent places are mixed by a browser to another side than by Pillow.
            assert found == pytest.approx(dict(named), abs=0.02 if file.name == "clear.png" else 1e-3), file.name
        assert tab.evaluate("model.difference") < 1e-4 and tab.evaluate("at('warning').hidden")
    assert "WebGPU" in tab.evaluate("at('facts').innerText")


@pytest.mark.long
def test_a_gpu_is_used_unless_it_is_in_software_or_the_address_says_otherwise(
    site: tuple[Path, str], tab: Page
) -> None:
    folder, address = site
    assert opened(tab, address) == "Runs on the CPU." and not asked_for(tab, "jspi")
    assert opened(tab, address, REAL) == "Runs on WebGPU."
    assert tab.choose(folder / "check.png")["device"] == "webgpu"
    assert opened(tab, address + "?device=wasm") == "Runs on the CPU."
    assert tab.open(address + "?device=quantum") == "failed"
    assert "wasm and webgpu only" in tab.evaluate("document.body.innerText")


@pytest.mark.long
def test_a_gpu_that_answers_otherwise_gives_way_to_the_cpu(site: tuple[Path, str], tab: Page) -> None:
    folder, address = site
    told = opened(tab, address, REAL, WRONG)
    assert told.startswith("Runs on the CPU, because the GPU answers otherwise than the export did: a logit differs by")
    assert tab.evaluate("at('warning').hidden") and tab.choose(folder / "check.png")["device"] == "wasm"
    assert opened(tab, address + "?device=webgpu") == "Runs on WebGPU."
    assert "Do not rely on these answers" in tab.evaluate("at('warning').textContent")


@pytest.mark.long
@pytest.mark.parametrize("failing", [LOST, LOSING, ERROR])
def test_a_gpu_that_is_lost_or_fails_gives_way_to_the_cpu(failing: str, site: tuple[Path, str], tab: Page) -> None:
    folder, address = site
    assert opened(tab, address, REAL, DEVICES) == "Runs on WebGPU."
    tab.evaluate(failing)
    answer = tab.choose(folder / "check.png")
    assert answer.get("device") == "wasm", answer
    assert tab.evaluate("at('device').textContent").startswith("Runs on the CPU, because WebGPU failed: ")
    facts: dict[str, Any] = json.loads((folder / "adapters.json").read_text())["adapters"]["first"]
    assert answer["logits"] == pytest.approx(facts["check"], rel=1e-4, abs=1e-4)
    assert tab.evaluate("at('warning').hidden")


@pytest.mark.long
@pytest.mark.parametrize("missing", [NONE, NULL, NO_JSPI])
def test_without_a_gpu_the_cpu_computes(missing: str, site: tuple[Path, str], tab: Page) -> None:
    _, address = site
    assert opened(tab, address, REAL, missing) == "Runs on the CPU." and not asked_for(tab, "jspi")
    assert tab.open(address + "?device=webgpu") == "failed"
    assert "The address asks for WebGPU, but the model" in tab.evaluate("document.body.innerText")


def test_int8_is_for_the_cpu() -> None:
    assert files_for("int8") == WASM
