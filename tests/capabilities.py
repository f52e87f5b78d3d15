"""Probe every method on every family and write the page of what works, merges, and why not.

`python tests/capabilities.py` writes docs/capabilities.md; a test compares the page with the probe.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

from support import CONFIGS, DEFAULTS, family

from visgraft import list_methods
from visgraft.core.attach import assemble, detach
from visgraft.errors import SiteError
from visgraft.export.merge import remedy, why_not_merged

PAGE = Path(__file__).parents[1] / "docs" / "capabilities.md"
# What the columns are called, and the tiny backbone of tests/support.py that is probed for each.
COLUMNS = {
    "ViT": "plain",
    "ViT (no qkv bias)": "no_qkv_bias",
    "ViT (SwiGLU)": "swiglu",
    "DeiT-3": "deit3",
    "DINOv2": "dinov2",
    "CLIP": "clip",
    "SigLIP": "siglip",
    "DINOv3": "dinov3",
    "PE": "pe",
    "BEiT": "beit",
    "EVA-02 (one qkv)": "eva_fused",
    "EVA-02 (q, k, v apart)": "eva_unfused",
    "Swin": "swin",
    "Swin (padded windows)": "swin_padded",
    "Swin V2": "swin_v2",
    "ConvNeXt": "convnext",
    "ConvNeXt V2": "convnext_v2",
    "MLP-Mixer": "mixer",
    "ResMLP": "resmlp",
    "AS-MLP": "as_mlp",
}
MERGES, WORKS, REFUSED = "merges", "works", "no"
HEAD = """# What works where

Probed, not claimed: `python tests/capabilities.py` attaches every method with its default options to a small backbone
of every family and writes this page; `tests/test_capabilities.py` fails when the two differ, and `tests/test_laws.py`
measures every merge. `visgraft methods --backbone NAME` answers the same for one timm model.
[Another table](export_table.md) says what becomes of each in other formats, and by how much answers differ there.

- **merges**: the trained model folds into the plain backbone (or is one already), with the same answers and no extra
  cost.
- **works**: it can be attached and trained, and stays beside the backbone; the reason stands below.
- **no**: it is refused by name; the reason stands below.
"""


@functools.cache
def probe(method: str, kind: str) -> tuple[str, str]:
    """Return what a method with its default options does on a tiny backbone, and why not more."""
    model, config = family(kind), list_methods()[method].Config()
    try:
        detach(assemble(model, config))
    except SiteError as error:
        return REFUSED, _reason(str(error))
    why = why_not_merged(model, config)
    if not why:
        return MERGES, ""
    option = re.match(r"train it with (\S+), which folds", remedy(model, config))
    return WORKS, _reason(why) + (f"; with `{option[1]}` it does merge" if option else "")


def _reason(message: str) -> str:
    """Leave out what differs from model to model: the first part of a line, without block numbers."""
    first = message.partition(";")[0]
    if "needs the site" in first:
        first = first.partition(", which")[0]
    for place in ("layers.0.blocks.0.", "stages.0.blocks.0.", "blocks.0."):
        first = first.replace(place, "")
    return first


def page() -> str:
    """Return docs/capabilities.md as the probe finds it."""
    found = {CONFIGS[n].method: {c: probe(CONFIGS[n].method, k) for c, k in COLUMNS.items()} for n in DEFAULTS}
    lines = [HEAD, "Families: " + "; ".join(COLUMNS) + ".\n"]
    lines += [*_table(["method", MERGES, WORKS, REFUSED], _rows(found)), "", "## Why not", ""]
    lines += _table(["method", "backbones", "reason"], _reasons(found))
    return "\n".join(lines) + "\n"


def _rows(found: dict[str, dict[str, tuple[str, str]]]) -> list[list[str]]:
    """One row per method: where it merges, where it works, where it is refused; the longest list is `all others`."""
    rows = []
    for method, cells in found.items():
        lists = [[c for c in COLUMNS if cells[c][0] == outcome] for outcome in (MERGES, WORKS, REFUSED)]
        longest = max(lists, key=len)
        rest = "all" if len(longest) == len(COLUMNS) else "all others"
        rows.append([f"`{method}`", *(rest if one is longest else "; ".join(one) or "–" for one in lists)])
    return rows


def _reasons(found: dict[str, dict[str, tuple[str, str]]]) -> list[list[str]]:
    rows = []
    for method, cells in found.items():
        by_reason: dict[tuple[str, str], list[str]] = {}
        for column, (outcome, reason) in cells.items():
            if reason:
                by_reason.setdefault((outcome, reason), []).append(column)
        for (outcome, reason), columns in by_reason.items():
            where = "all" if len(columns) == len(COLUMNS) else "; ".join(columns)
            others = [column for column in COLUMNS if column not in columns]
            if 0 < len(others) < len(columns) // 2:
                where = f"all but {'; '.join(others)}"
            told = reason if outcome == WORKS else f"refused: {reason}"
            rows.append([f"`{method}`", where, told])
    return rows


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")
