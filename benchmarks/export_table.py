"""How far does each exported file answer from the model, for every method, family and format?

    OMP_NUM_THREADS=1 python benchmarks/export_table.py --json table.json          # about an hour; killed, it goes on
    OMP_NUM_THREADS=1 python benchmarks/export_table.py --json table.json --page   # and writes docs/export_table.md

The models are those of the tests: a tiny one of each family with random weights, of which an adapter is written, loaded
and exported as a user does. Every method stands on the plain ViT; `alore`, `sct`, `lora` and `bitfit` stand on every
family. A figure is the largest difference of any logit between the adapter in torch and the file in its own runtime, on
eight drawn pictures, divided by the largest logit. What the file of `--json` holds already is not measured again.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import shared

from visgraft import VisgraftError, export_adapter, list_methods, load
from visgraft.export.format import missing_packages
from visgraft.export.formats import FORMATS
from visgraft.export.proof import torch_answers
from visgraft.export.samples import drawn_samples

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "export_table.md"
BEGIN, END = "<!-- printed by benchmarks/export_table.py -->\n", "<!-- to here -->\n"
TOLD = "onnx,onnx-adapter,torch,openvino,executorch,peft,timm"  # not web, whose graph is that of onnx-adapter
EVERYWHERE = "alore,sct,lora,bitfit"
NARROW: dict[str, dict[str, Any]] = {
    "alore": {"rank": 1, "experts": 2}, "lora": {"rank": 2}, "dora": {"rank": 2}, "fact": {"rank": 2},
    "arc": {"bottleneck": 4},
}  # fmt: skip
"""Options for backbones 16 to 48 channels wide, in which the usual ranks would be those of whole matrices."""
LARGEST = 1e-4
"""Of the largest logit: what is above is listed beneath the table, as are refusals without a word here."""
WORDS = {
    "needs the site|cannot cut into squares": "no place",
    "inserts tokens|no linear layer alone|is not linear|adds a constant": "does not fold",
    "no linear layer or convolution": "no linear layer",
    "belongs to no layer": "no linear layer",
    "without calling the layer": "not called",
    "larger than the layer": "full rank",
}
"""What a refusal is called in the table, by what its message says."""


def pairs(methods: Sequence[str], families: Sequence[str]) -> list[tuple[str, str]]:
    """Return every method on the plain ViT, and some of them on the other families."""
    others = [kind for kind in families if kind != "plain"]
    everywhere = [name for name in EVERYWHERE.split(",") if name in methods]
    return [(name, "plain") for name in methods] + [(name, kind) for name in everywhere for kind in others]


def word(message: str) -> str | None:
    """Return what a refusal is called; None of one that nobody expects."""
    return next((word for pattern, word in WORDS.items() if re.search(pattern, message)), None)


def measured(method: str, kind: str, forms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Write an adapter and export it to these formats; returns each one's relative difference, or why not."""
    from peft_adapters import written

    with tempfile.TemporaryDirectory() as place:
        try:
            config = list_methods()[method].Config(**NARROW.get(method, {}))
            adapter, weights = written(config, Path(place), kind)
        except VisgraftError as error:
            return {form: {"refusal": str(error)} for form in forms}
        adapted = load(adapter, weights=str(weights))
        largest = torch_answers(adapted.model, drawn_samples(adapted.record.data_config)).abs().max().item()
        return {form: exported(adapter, weights, form, largest) for form in forms}


def exported(adapter: Path, weights: Path, form: str, largest: float) -> dict[str, Any]:
    """Export to one format, and return what its certificate says."""
    out = adapter.parent / f"out-{form}{FORMATS[form].suffix}"
    try:
        told = export_adapter(adapter, out, form, weights=str(weights))
    except VisgraftError as error:
        return {"refusal": str(error).replace(str(adapter), "the adapter")}
    return {"difference": told["largest_difference"] / largest, "largest_logit": largest, "merged": told["merged"]}


def shown(cell: Mapping[str, Any]) -> str:
    """Write a cell of the table."""
    if "refusal" in cell:
        return word(cell["refusal"]) or "**refused**"
    told = f"{cell['difference']:.0e}".replace("e-0", "e-") if cell["difference"] else "0"
    return told if cell["difference"] <= LARGEST else f"**{told}**"


def lines(cells: Mapping[str, Any], rows: Sequence[tuple[str, str]], forms: Sequence[str]) -> str:
    """Return the table of what was measured so far, and beneath it what nobody expects."""
    table = []
    for method, kind in rows:
        if not (row := cells.get(f"{method} {kind}")):
            continue
        folds = {one["merged"] for one in row.values() if "merged" in one}
        table.append([method, kind, "yes" if True in folds else "no" if folds else "–", *(
            shown(row[form]) if form in row else "–" for form in forms
        )])  # fmt: skip
    unexpected = [
        f"- {name}, {form}: {one.get('refusal', 'differs')}"
        for name, row in cells.items()
        for form, one in row.items()
        if (word(one["refusal"]) is None if "refusal" in one else one["difference"] > LARGEST)
    ]
    told = [shared.table(["method", "family", "folds", *forms], table)]
    done = sum(form in cells.get(f"{method} {kind}", {}) for method, kind in rows for form in forms)
    if done < len(rows) * len(forms):
        told += ["", f"{done} of {len(rows) * len(forms)} cells are measured so far; – stands for the others."]
    return "\n".join([*told, "", *unexpected] if unexpected else told)


def earlier(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the cells that the file of `--json` holds.

    Raises:
        SystemExit: they are another machine's, or of other versions.
    """
    if asked.json is None or not asked.json.is_file():
        return {}
    known = json.loads(asked.json.read_text(encoding="utf-8"))
    if known["machine"] != shared.machine():
        raise SystemExit(f"{asked.json} is of another machine, other threads or versions; name another file by --json")
    return dict(known["cells"])


def main() -> None:
    """Measure what is missing, print the table, and with `--page` put it into the documentation."""
    begin = time.monotonic()
    sys.path.append(str(ROOT / "tests"))  # where the tiny models are
    from support import ALL_FAMILIES

    parser = shared.arguments(__doc__)
    parser.add_argument("--methods", default=",".join(list_methods()))
    parser.add_argument("--families", default=",".join(ALL_FAMILIES))
    parser.add_argument("--formats", default=TOLD)
    parser.add_argument("--minutes", type=float, help="begin no row after so long; 0: print only")
    parser.add_argument("--page", action="store_true", help="also write the table into docs/export_table.md")
    asked = parser.parse_args()
    forms = [name for name in asked.formats.split(",") if not missing_packages(FORMATS[name])]
    rows, cells = pairs(asked.methods.split(","), asked.families.split(",")), earlier(asked)
    for method, kind in rows:
        if asked.minutes is not None and time.monotonic() - begin >= 60 * asked.minutes:
            break
        row = cells.setdefault(f"{method} {kind}", {})
        missing = [form for form in forms if form not in row]
        if missing:
            row.update(measured(method, kind, missing))
            shared.write(asked, {"cells": cells})
            print(f"{method} on {kind}: {', '.join(f'{form} {shown(row[form])}' for form in forms)}", flush=True)
    table = lines(cells, rows, forms)
    print(f"\n{table}")
    shared.report(asked, {"cells": cells})
    if asked.page:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
