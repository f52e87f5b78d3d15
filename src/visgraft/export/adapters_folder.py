"""A folder of adapters that share one backbone file: its list `adapters.json`, and how an earlier one is taken over."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visgraft.export.format import ExportError, Subject
from visgraft.export.metadata import metadata
from visgraft.files import write_json

BACKBONE, ADAPTERS = "backbone.onnx", "adapters.json"
_NAME = r"\w[\w.-]{,199}"
"""What an adapter may be called: with its ending a file's name on every system."""


def check_name(name: str | None) -> None:
    """Raise an ExportError where an adapter's file cannot be called so."""
    if name is not None and not re.fullmatch(_NAME, name):
        raise ExportError(f"--name is {name!r:.80}, but must be letters, digits, - and _ only, at most 200")


def write_adapters(folder: Path, about: Mapping[str, Any], known: Mapping[str, Any], **more: Any) -> None:
    """Write the list of a folder's adapters, with what their backbone is, and more that is compared with nothing."""
    write_json(folder / ADAPTERS, {"backbone": about, "adapters": known, **more})  # classes need not be valid UTF-8


def read_adapters(folder: Path) -> dict[str, Any]:
    """Return what `write_adapters` wrote."""
    found: dict[str, Any] = json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))
    return found


def read_base(base: Path, form: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the adapters of an earlier export, and what its backbone is.

    Raises:
        ExportError: there is none.
    """
    try:
        found = read_adapters(base)
        return dict(found["adapters"]), dict(found["backbone"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ExportError(f"--base is {base}, which is no export of the format {form} ({error})") from error


def taken_over(
    base: Path, target: Path, about: Mapping[str, Any], name: str, form: str, graphs: Sequence[str] = (BACKBONE,)
) -> dict[str, Any]:
    """Put the graphs and adapters of an earlier export into the new folder; returns its adapters.

    Raises:
        ExportError: there is none, its backbone is another, or the name is taken.
    """
    known, theirs = read_base(base, form)
    if theirs.get("mixed") != about.get("mixed"):
        remedy = "add" if theirs.get("mixed") else "leave out"
        raise ExportError(f"--base {base} is another kind of onnx-adapter; {remedy} --mixed, or export without --base")
    for key, facts in known.items():  # its file is put under the same name, which must be no other file of the folder
        file = str(facts.get("file")) if isinstance(facts, dict) else ""
        if not (re.fullmatch(_NAME, key) and Path(file).name == file and file.rpartition(".")[0] == key):
            raise ExportError(f"{base / ADAPTERS} is damaged: adapter {key!r:.80}; restore it or export without --base")
    for key in dict.fromkeys((*about, *theirs)):
        if theirs.get(key) != about.get(key):
            raise ExportError(f"--base {base} does not fit this adapter: its {key} is another; export without --base")
    if name in known:
        raise ExportError(f"--base {base} has an adapter {name!r} already; give this one another --name")
    for file in (*graphs, *(facts["file"] for facts in known.values())):
        source = (base / file).resolve()  # a link to a link would lead nowhere from the new folder
        if not source.is_file():
            raise ExportError(f"--base {base} is damaged: {file} is missing; restore it or export without --base")
        try:
            os.link(source, target / file)  # the backbone is large, and neither copy is ever written to
        except OSError:
            shutil.copyfile(source, target / file)
    return known


def file_name(adapter: str) -> str:
    """Return a file's name made of an adapter's path, which may be one of the hub with a revision."""
    made = re.sub(r"[^\w.-]+", "-", Path(adapter).name).strip("-.")[:200]
    return made or "adapter"


def facts_of(subject: Subject, options: Any) -> dict[str, Any]:
    """Return the adapter's metadata as JSON values."""
    return {key: _json(value) for key, value in metadata(subject, options).items()}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
