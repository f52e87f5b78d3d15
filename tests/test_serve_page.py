"""The server's page in headless Chromium: what a user sees and what is sent, by the server itself and by a stand-in."""

import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from browser import CHROMIUM, Page, browser
from page_stub import LIMITS, about, stub
from PIL import Image
from predicting import make
from serving import running

import visgraft
from visgraft.serve.application import PAGE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
HOSTILE = "<img src=x onerror=window.bad=1>"
NAMES = [HOSTILE, '\u202eevil\u202c it\'s "$HOME" `id` 🚀', "x" * 300, "a/b&top=1#?%41"]


@pytest.fixture(scope="module")
def shared() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture
def tab(shared: Page) -> Page:
    shared.said.clear()
    shared.call("Network.setCacheDisabled", cacheDisabled=True)
    shared.call("Page.navigate", url="about:blank")
    return shared


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "red.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(file)
    return file


def text(tab: Page, selector: str) -> str:
    return str(tab.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))


def texts(tab: Page, selector: str) -> list[str]:
    return list(tab.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)"))


def hidden(tab: Page, selector: str) -> bool:
    return bool(tab.evaluate(f"document.querySelector({json.dumps(selector)}).hidden"))


def click(tab: Page, selector: str) -> None:
    tab.evaluate(f"document.querySelector({json.dumps(selector)}).click()")


def until(tab: Page, code: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not tab.evaluate(f"Boolean({code})"):
        assert time.monotonic() < end, (code, tab.evaluate("document.body.innerText"))
        time.sleep(0.02)


def press(tab: Page, key: str, words: str = "", modifiers: int = 0) -> None:
    """Press a key, as a keyboard does."""
    codes = {"Tab": 9, "Enter": 13, " ": 32}
    told = {"key": key, "windowsVirtualKeyCode": codes[key], "modifiers": modifiers}
    tab.call("Input.dispatchKeyEvent", type="keyDown", text=words, **told)
    tab.call("Input.dispatchKeyEvent", type="keyUp", **told)


def tab_to(tab: Page, selector: str) -> None:
    for _ in range(40):
        if tab.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
            return
        press(tab, "Tab")
    raise AssertionError(f"Tab does not come to {selector}")


def drop(tab: Page, *files: tuple[str, bytes], event: str = "drop") -> None:
    """Drop or paste files."""
    made = ",".join(f"new File([new Uint8Array({list(data)})], {json.dumps(name)})" for name, data in files)
    tab.evaluate(
        f"{{ const data = new DataTransfer(); for (const file of [{made}]) data.items.add(file); document.body"
        f".dispatchEvent(new {'DragEvent' if event == 'drop' else 'ClipboardEvent'}({event!r}, {{bubbles: true, "
        f"cancelable: true, {'dataTransfer' if event == 'drop' else 'clipboardData'}: data}})); }}"
    )


def asked_elsewhere(tab: Page, address: str) -> list[str]:
    tab.evaluate("0")
    urls = [json.loads(said)["request"]["url"] for said in tab.said if '"request"' in said]
    assert urls
    return [url for url in urls if not url.startswith((address, "blob:", "data:"))]


def test_the_page_is_plain_files_that_the_server_gives_out() -> None:
    folder = resources.files("visgraft.serve")
    page = (folder / "page.html").read_text(encoding="utf-8")
    parts = {path.name for path in Path(str(folder)).iterdir() if path.suffix in (".css", ".js")}
    assert parts == set(PAGE) and set(re.findall(r'(?:href|src)="page/([^"]+)"', page)) == {"page.css", "page.js"}
    whole = page + "".join((folder / name).read_text(encoding="utf-8") for name in parts)
    for banned in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "http://", "https://"):
        assert banned not in whole, banned
    assert "unsafe" not in page and " style=" not in page and not re.findall(r"\son[a-z]+=", page)


def test_a_picture_gets_the_servers_answers(tab: Page, picture: Path, tmp_path: Path) -> None:
    named = {"one": make(tmp_path / "one", "linear"), "deep/zwei ü": make(tmp_path / "two", "lora", seed=2)}
    expected = {name: visgraft.predict(visgraft.load(path), [picture], top=3)[0] for name, path in named.items()}
    with running(tmp_path / "store", named, tokens=("open",)) as server:
        address = f"http://127.0.0.1:{server.port}/"
        assert tab.open(address) == "failed"
        assert not hidden(tab, "#ask-token") and tab.evaluate("document.activeElement.id") == "token"
        tab.evaluate("document.getElementById('token').value = 'open'; 0")
        click(tab, "#ask-token button")
        until(tab, "document.documentElement.dataset.state === 'ready'")
        found = tab.choose(picture)
        assert not found["error"] and found["status"].startswith("one: "), found
        assert texts(tab, ".from") == ["one", "deep/zwei ü"] and text(tab, "#pictures h3") == "red.png"
        shown = list(zip(texts(tab, ".shares .name"), texts(tab, ".shares .share"), strict=True))
        assert shown == [(label, f"{100 * p:.1f} %") for classes in expected.values() for label, p in classes]
        assert tab.evaluate("document.querySelector('#pictures img').naturalWidth") == 40
        assert re.fullmatch(
            r"Pictures read in [\d,]+ ms, .*computed in [\d,]+ ms, there and back [\d,]+ ms\.", text(tab, "#facts")
        )
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no picture")
        assert "1 picture could not be answered" in tab.choose(broken)["status"]
        assert "broken.png" in text(tab, ".wrong") and len(texts(tab, ".shares")) == 2
        server.ask("DELETE", "/adapters/one", headers={"Authorization": "Bearer open"})
        tab.evaluate("document.getElementById('clear').click()")
        assert "no adapter 'one'" in tab.choose(picture)["error"]
        assert texts(tab, "#adapters label") == ["deep/zwei ü"], "the list is up to date again"
        assert not asked_elsewhere(tab, address)
    assert not [said for said in tab.said if "Content Security Policy" in said or "exceptionDetails" in said]


def test_hostile_names_are_text(tab: Page, picture: Path) -> None:
    with stub([about(name, NAMES) for name in NAMES]) as (address, kind):
        assert tab.open(address) == "ready"
        click(tab, "#all")
        drop(tab, *((f"{name[:90]}.png".replace("/", ""), picture.read_bytes()) for name in NAMES))
        until(tab, "document.querySelectorAll('.shares').length === 16")
        assert set(texts(tab, ".from")) == set(NAMES) == set(texts(tab, ".shares .name")[:4])
        assert [len(names) for _, names, _ in kind.asked] == [4] and kind.asked[0][1] == NAMES
        tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; }); 0")
        until(tab, "document.querySelectorAll('.labels li').length === 16")
        assert tab.evaluate("window.bad") is None and tab.evaluate("document.images.length") == 4
        for width in (390, 1280):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            tab.call("Emulation.setDeviceMetricsOverride", **size)
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
        drop(tab, (f"broken {HOSTILE}", b""), event="paste")
        until(tab, "document.querySelector('.wrong:not([hidden])')")
        assert "<b>no</b>" in text(tab, ".wrong:not([hidden])")
        assert not asked_elsewhere(tab, address)


def test_a_token_is_asked_for_and_kept_in_this_tab_alone(tab: Page, picture: Path) -> None:
    with stub([about("one", ["a", "b"])], token="s3cret") as (address, _):
        assert tab.open(address) == "failed"
        for given, label in (("wrong", "does not take this token"), ("nö", "does not take this token")):
            tab.evaluate(f"document.getElementById('token').value = {given!r}; 0")
            click(tab, "#ask-token button")
            until(tab, f"document.querySelector('label[for=token]').textContent.includes({label!r})")
        tab.evaluate("document.getElementById('token').value = 's3cret'; 0")
        click(tab, "#ask-token button")
        until(tab, "document.documentElement.dataset.state === 'ready'")
        assert hidden(tab, "#ask-token") and not tab.choose(picture)["error"]
        assert "s3cret" not in tab.evaluate("JSON.stringify({...localStorage}) + document.documentElement.outerHTML")
        assert "s3cret" in tab.evaluate("JSON.stringify({...sessionStorage})")
        assert shlex.split(text(tab, "#command"))[1:3] == ["-H", "Authorization: Bearer $TOKEN"]


def test_a_busy_server_is_asked_again_a_few_times(tab: Page, picture: Path) -> None:
    with stub([about("one", ["a", "b"])], busy=1) as (address, kind):
        assert tab.open(address) == "ready"
        drop(tab, (picture.name, picture.read_bytes()))
        until(tab, "document.getElementById('status').textContent.includes('asked again in 1 s (1 of 3)')")
        until(tab, "document.querySelector('.shares')")
        kind.busy = 9
        assert "too many pictures are under way" in tab.choose(picture)["error"]
        assert kind.busy == 5, "once, and three times more"
        kind.busy = 0
        click(tab, "#again")
        until(tab, "document.querySelectorAll('.shares').length === 2")


@pytest.mark.parametrize("name", ["it's $HOME.png", 'a"b\\c;type=x,.png', "`id` & 🚀.png"])
def test_the_command_is_what_is_asked(name: str, tab: Page, picture: Path, tmp_path: Path) -> None:
    with stub([about(one, ["a", "b"]) for one in NAMES[:3]]) as (address, kind):
        assert tab.open(address) == "ready"
        drop(tab, (name, picture.read_bytes()))
        until(tab, "document.querySelectorAll('.shares').length === 3")
        command = text(tab, "#command")
        program, option, part, url = shlex.split(command)
        escaped = name.replace("\\", "\\\\").replace('"', '\\"')
        assert (program, option, part) == ("curl", "-F", f'image=@"{escaped}"')
        assert url.startswith(f"{address}predict?") and url.isascii()
        assert parse_qs(urlsplit(url).query) == {"adapter": NAMES[:3], "top": ["5"]}
        if shutil.which("curl"):
            shutil.copyfile(picture, tmp_path / name)
            told = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=True).stdout
            assert [one["adapter"] for one in json.loads(told)["answers"]] == NAMES[:3] == kind.asked[-1][1]


def test_several_classes_stand_each_by_itself(tab: Page, picture: Path) -> None:
    with stub([about("tags", [f"c{i}" for i in range(20)], several=True)]) as (address, kind):
        assert tab.open(address) == "ready" and not tab.choose(picture)["error"]
        assert parse_qs(urlsplit(kind.asked[0][0]).query)["top"] == ["20"]
        assert texts(tab, ".shares .name") == ["c0"] and "Each class by itself" in text(tab, ".answers details")
        assert "Less likely: c1 45.0 %, c2 22.5 %" in text(tab, ".answers details")
        assert "and 14 classes more" in text(tab, ".answers details")


def test_unlike_pictures_are_marked_by_those_that_can(tab: Page, picture: Path) -> None:
    listed = [
        about("one", ["a", "b"], unlike_from=0.05),
        about("few", ["a", "b"], unlike_from=0.2),
        about("old", ["c", "d"]),
    ]
    with stub(listed) as (address, kind):
        assert tab.open(address) == "ready" and not hidden(tab, "#mark")
        assert not tab.choose(picture)["error"] and not texts(tab, ".badge")
        click(tab, "#unlike")
        until(tab, "document.querySelector('.badge')")
        assert [(names, "unlike=0.05" in path) for path, names, _ in kind.asked] == [
            (["one", "few", "old"], False), (["one"], True),
        ]  # fmt: skip
        assert "1.2 % are as unlike as this one" in text(tab, ".answers details:nth-child(1)")
        assert ["cannot mark" in one for one in texts(tab, ".answers details")] == [False, True, True]
        until(tab, "document.getElementById('status').textContent.includes('of a picture unlike its training')")
        drop(tab, ("second.png", picture.read_bytes()))
        until(tab, "document.querySelectorAll('.shares').length === 6")
        assert len(kind.asked) == 4, "those that mark and those that cannot are asked apart"
        assert "unlike" not in text(tab, "#command"), "not all that are chosen can mark"
        assert tab.open(f"{address}?again") == "ready" and tab.evaluate("document.getElementById('unlike').checked")
        click(tab, "#unlike")
        assert not tab.choose(picture)["error"] and "unlike" not in kind.asked[-1][0]
        click(tab, "#unlike")
        until(tab, "document.querySelector('.badge')")
        click(tab, "#unlike")
        until(tab, "!document.querySelector('.badge')")
        until(tab, "document.getElementById('status').textContent.startsWith('one: ')")
        assert "unlike" not in text(tab, "#status"), "what is not marked is not told either"
    with stub([about("old", ["a", "b"])]) as (address, _):
        assert tab.open(address) == "ready" and hidden(tab, "#mark")


def test_an_adapter_that_marks_no_more_answers_all_the_same(tab: Page, picture: Path) -> None:
    with stub([about("one", ["a", "b"], unlike_from=0.05)], replaced=["one"]) as (address, kind):
        assert tab.open(address) == "ready"
        click(tab, "#unlike")
        assert "one cannot tell unlike pictures" in tab.choose(picture)["error"] and not kind.asked[1:]
        until(tab, "document.getElementById('mark').hidden")
        click(tab, "#again")
        until(tab, "document.querySelector('.shares')")
        assert "unlike" not in kind.asked[-1][0] and "cannot mark" not in text(tab, ".answers")


def test_a_mark_that_does_not_come_is_not_asked_for_again_and_again(tab: Page, picture: Path) -> None:
    with stub([about("one", ["a", "b"], unlike_from=0.05)], marks=False) as (address, kind):
        assert tab.open(address) == "ready"
        click(tab, "#unlike")
        assert "answers something else than it was asked" in tab.choose(picture)["error"]
        assert len(kind.asked) == 1


def test_another_tab_does_not_turn_the_mark_on(tab: Page, picture: Path) -> None:
    listed = about("one", ["a", "b"], unlike_from=0.05) | {"digest": "another"}  # so that the list is read again
    with stub([listed]) as (address, kind):
        assert tab.open(address) == "ready"
        tab.evaluate("localStorage.setItem('visgraft.unlike', 'yes'); 0")
        assert not tab.choose(picture)["error"]
        assert not tab.evaluate("document.getElementById('unlike').checked")
        assert ["unlike" in path for path, _, _ in kind.asked] == [False]


def test_many_adapters_are_searched_and_remembered(tab: Page, picture: Path) -> None:
    listed = [about(f"team {i % 7}/task {i}", ["a", f"only {i}"]) for i in range(300)]
    with stub(listed) as (address, kind):
        assert tab.open(address) == "ready" and text(tab, "#count") == "0 of 300 adapters chosen"
        assert "Choose an adapter" in tab.choose(picture)["status"] and not kind.asked
        tab.evaluate("document.getElementById('search').value = 'ONLY 29'; 0")
        tab.evaluate("document.getElementById('search').dispatchEvent(new Event('input'))")
        click(tab, "#all")
        assert text(tab, "#count") == "11 of 300 adapters chosen, 11 listed"  # 29 and 290 to 299
        until(tab, "document.querySelectorAll('.answers > details').length === 11")
        assert not tab.evaluate("document.querySelector('.answers > details').open"), (
            "the first class of each is enough"
        )
        assert tab.open(f"{address}?again") == "ready" and text(tab, "#count").startswith("11 of 300")
        click(tab, "#all")
        assert not tab.choose(picture)["error"]
        assert max(len(path) for path, _, _ in kind.asked) < 6000 and len(kind.asked) > 5
        assert len(texts(tab, ".answers > details")) == 300


def test_all_by_keyboard_and_with_names_for_everything(tab: Page, picture: Path) -> None:
    with stub([about(f"n{i}", ["a", "b"]) for i in range(5)]) as (address, _):
        assert tab.open(address) == "ready"
        tab_to(tab, "#search")
        tab.call("Input.insertText", text="n3")
        tab_to(tab, "#adapters input")
        press(tab, " ", " ")
        assert text(tab, "#count") == "1 of 5 adapters chosen, 1 listed"
        tab_to(tab, "#file")
        outline = "getComputedStyle(document.querySelector('#file + .button')).outlineStyle"
        assert tab.evaluate(outline) == "solid"
        tab.call("Page.setInterceptFileChooserDialog", enabled=True)
        press(tab, "Enter", "\r")
        drop(tab, (picture.name, picture.read_bytes()), event="paste")
        until(tab, "document.querySelector('.shares')")
        tab_to(tab, "#pictures .head button")
        press(tab, "Enter", "\r")
        until(tab, "!document.querySelector('.shares')")
        assert tab.evaluate("document.activeElement.id") == "file"
        nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
        roles = ("button", "checkbox", "textbox", "searchbox", "combobox", "link", "heading", "status", "region")
        found = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
        unnamed = [n for n in found if n["role"]["value"] != "status" and not n.get("name", {}).get("value")]
        assert len(found) > 15 and not unnamed
        tab.call("Page.setInterceptFileChooserDialog", enabled=False)


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_axe_finds_nothing_wrong(width: int, dark: bool, tab: Page, picture: Path, tmp_path: Path) -> None:
    axe = (resources.files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    with stub([about(name, NAMES, unlike_from=0.05) for name in NAMES[:2]] + [about("old", NAMES)]) as (address, _):
        assert tab.open(address) == "ready"
        click(tab, "#unlike")
        tab.picture(tmp_path / "page.png", width, dark)
        drop(tab, (picture.name, picture.read_bytes()), ("broken.png", b"no picture"))
        until(tab, "document.querySelectorAll('.shares').length === 3")
        tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; }); 0")
        found = tab.evaluate(f"{axe}; axe.run()")
    assert len(found["passes"]) > 20
    assert not [(one["id"], one["impact"], [n["html"] for n in one["nodes"]]) for one in found["violations"]]


def test_what_cannot_be_sent_is_said_beside_it(tab: Page, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "body_bytes", 5000)
    with stub([about("one", ["a", "b"])]) as (address, kind):
        assert tab.open(address) == "ready"
        drop(tab, ("large.png", bytes(6000)), *((f"{i}.png", bytes(900)) for i in range(5)))
        until(tab, "document.querySelectorAll('.shares').length === 5")
        assert "larger than the 0.0 MB" in text(tab, ".wrong:not([hidden])")
        assert [len(images) for _, _, images in kind.asked] == [2, 2, 1]
    drop(tab, (picture.name, picture.read_bytes()))
    until(tab, "document.getElementById('wrong').textContent.includes('The server does not answer')")
