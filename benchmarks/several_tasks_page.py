"""Put the tables of results-several-tasks/ into docs/several_tasks_evidence.md, between its marks.

    python benchmarks/several_tasks_page.py

A test compares the page with the lines. Intervals are Student's t over seeds, 95 %.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scale_page import table
from scipy.stats import t
from several_tasks import NUMBER_OF, SCENE_TASKS, UNITS, read_lines

JUDGED = (
    ("joint", "quarter_parameters"), ("joint", "quarter_time"), ("joint_long", "quarter_parameters"),
    ("own_factors", "joint_long"),
)  # fmt: skip
"""The pairs of forms of which the page's criteria say something."""
RIVALS = {
    "joint": ("quarter_parameters", "quarter_time", "separate"),
    "joint_long": ("quarter_parameters", "separate"),
    "own_factors": ("joint_long", "quarter_parameters"),
}
ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "several_tasks_evidence.md", ROOT / "results-several-tasks"
TITLES = {
    "joint": "joint", "quarter_parameters": "equal parameters", "quarter_time": "equal time",
    "separate": "separate, all of both", "joint_long": "joint, four times as long",
    "own_factors": "own factors",
}  # fmt: skip
STYLES = ("test", "restyled")
COVERED = ("joint", "joint_long", "numbers", "gauge_classes", "gauge_number")
"""The forms of a single adapter."""
NOTHING = "Nothing is measured yet."
Line = Mapping[str, Any]


class Key(NamedTuple):
    """What a row is about; `share` is empty and `colours` False unless that was asked for."""

    method: str
    form: str
    share: str = ""
    colours: bool = False

    @property
    def title(self) -> str:
        """What the row is called."""
        return TITLES[self.form] + (f", share {self.share}" if self.share else "")

    @property
    def augmented(self) -> str:
        """What was changed in training images."""
        return "colours" if self.colours else "nothing"


Rows = dict[Key, dict[int, list[Line]]]


def rows_of(lines: Sequence[Line]) -> Rows:
    """Return the lines of trainings by what they are about, then by seed, complete ones only."""
    found: Rows = {}
    for line in lines:
        if "figures" in line:
            key = Key(line["method"], line["form"], line["share"] or "", bool(line.get("rand_augment")))
            found.setdefault(key, {}).setdefault(line["seed"], []).append(line)
    return {
        key: complete
        for key, seeds in found.items()
        if (complete := {seed: own for seed, own in sorted(seeds.items()) if key.form not in TITLES or _whole(own)})
    }


def _whole(lines: Sequence[Line]) -> bool:
    return {label for line in lines for label in line["figures"]["test"]} == set(SCENE_TASKS)


def top1(lines: Sequence[Line], part: str) -> np.ndarray:
    """Return top-1 of a seed's adapters in percent [tasks]."""
    found = {name: one["top1"] for line in lines for name, one in line["figures"][part].items()}
    return 100 * np.array([found[task] for task in SCENE_TASKS])


def interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Return mean and limits of the 95 % interval over seeds; None of fewer than three."""
    if len(values) < 3:
        return None
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    middle = float(np.mean(values))
    return middle, middle - half, middle + half


def spread(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Write a mean with the standard deviation over seeds, where there are several."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{deviation}"


def limits(values: Sequence[float], sign: str = "") -> str:
    """Write a mean with its interval behind it."""
    found = interval(values)
    behind = "" if found is None else f" [{found[1]:{sign}.1f}, {found[2]:{sign}.1f}]"
    return f"{np.mean(values):{sign}.1f}{behind}"


def accuracy_table(rows: Rows, part: str) -> str:
    """Return top-1 of every form by task."""
    body = []
    for key, seeds in rows.items():
        if key.form in TITLES:
            found = np.array([top1(lines, part) for lines in seeds.values()])
            one = next(iter(seeds.values()))
            seconds = np.mean([sum(line["seconds"] for line in lines) for lines in seeds.values()])
            body.append([
                key.augmented, key.method, key.title, f"{sum(line['parameters'] for line in one):,}",
                *(spread(found[:, n]) for n in range(len(SCENE_TASKS))), limits(found.mean(1)), str(len(seeds)),
                f"{seconds / 60:.0f}",
            ])  # fmt: skip
    head = ["augmented", "method", "form", "parameters", *SCENE_TASKS, "mean of 4", "seeds", "minutes"]
    return table(head, sorted(body), 3) if body else NOTHING


def _paired(rows: Rows) -> Iterator[tuple[Key, str, dict[int, list[Line]], dict[int, list[Line]]]]:
    """Yield what a row is about, the form that it is compared with, and the lines of the seeds of both."""
    for key, seeds in rows.items():
        for other in RIVALS.get(key.form, ()):
            rivals = rows.get(key._replace(form=other, share=""), {})
            common = [seed for seed in seeds if seed in rivals]
            if common:
                ours, theirs = ({seed: found[seed] for seed in common} for found in (seeds, rivals))
                yield key, other, ours, theirs


def difference_table(rows: Rows) -> str:
    """Return one adapter less the others, in points, and what the criteria say of it."""
    body = []
    for key, other, first, second in _paired(rows):
        ours, theirs = key.title, TITLES[other]
        for part in STYLES:
            found = np.array([top1(first[seed], part) - top1(second[seed], part) for seed in first])
            said = verdict(key.form, other, found.mean(1)) if part == "test" else ""
            body.append([
                key.augmented, key.method, f"{ours} − {theirs}", part,
                *(spread(found[:, n], sign="+") for n in range(len(SCENE_TASKS))),
                limits(found.mean(1), "+"), str(len(found)), said,
            ])  # fmt: skip
    head = ["augmented", "method", "difference", "images", *SCENE_TASKS, "mean of 4", "seeds", "criterion"]
    return table(head, sorted(body), 4) if body else NOTHING


def verdict(form: str, other: str, differences: Sequence[float]) -> str:
    """Return what the page's criteria say of a difference over seeds, where they say something."""
    if (form, other) not in JUDGED:
        return "none"
    found = interval(differences)
    if found is None:
        return "needs 3 seeds"
    _, low, high = found
    if low > 0:
        return "better"
    if other == "quarter_parameters" and low > -2:
        return "as good"
    return "worse" if high < 0 else "not shown"


def gauge_table(rows: Rows) -> str:
    """Return the mean absolute error of readings as a number and as one of 16 classes."""
    body = []
    for key, number in rows.items():
        classes = rows.get(key._replace(form="gauge_classes"), {})
        if key.form == "gauge_number":
            common = [seed for seed in number if seed in classes]
            if common:
                said = [number[seed][0]["figures"]["test"]["reading"] for seed in common]
                named = [classes[seed][0]["figures"]["test"]["position"] for seed in common]
                lower = [one["mae"] < other["mae"] for one, other in zip(said, named, strict=True)]
                body.append([
                    key.augmented, key.method,
                    spread([one["mae"] for one in said], 3), spread([one["mae"] for one in named], 3),
                    spread([one["mae_mean"] for one in named], 3), spread([100 * one["top1"] for one in named]),
                    f"{said[0]['constant_mae']:.2f}", f"{sum(lower)} of {len(lower)}",
                ])  # fmt: skip
    head = ["augmented", "method", "number", "class, its middle", "class, mean of the middles", "class, top-1 (%)"]
    head += ["constant answer", "seeds in which the number is nearer than the class"]
    return table(head, body, 2) if body else NOTHING


def number_table(rows: Rows) -> str:
    """Return the mean absolute error of location, count and distance as numbers and as classes, in one adapter."""
    body = []
    for key, numbers in rows.items():
        joint = rows.get(key._replace(form="joint"), {})
        if key.form == "numbers":
            for part in STYLES:
                for task, name in NUMBER_OF.items():
                    common = [seed for seed in numbers if seed in joint and name in numbers[seed][0]["figures"][part]]
                    if common:
                        said = [numbers[seed][0]["figures"][part][name] for seed in common]
                        named = [joint[seed][0]["figures"][part][task] for seed in common]
                        unit = UNITS[name] or "things"
                        body.append([
                            key.augmented, key.method, part, f"{task}, {unit}", spread([one["mae"] for one in said], 2),
                            spread([one["mae"] for one in named], 2), spread([one["mae_mean"] for one in named], 2),
                            f"{said[0]['constant_mae']:.2f}", str(len(common)),
                        ])  # fmt: skip
    head = ["augmented", "method", "images", "error of", "number", "class, its middle", "class, mean of the middles"]
    head += ["constant answer", "seeds"]
    return table(head, body, 4) if body else NOTHING


def answer_table(lines: Sequence[Line]) -> str:
    """Return bytes and time per answer, of the last measurement of each method."""
    last = {line["method"]: line for line in lines if line["form"] == "answers"}
    body = []
    for method, line in last.items():
        four = sum(size for name, size in line["bytes"].items() if name != "joint")
        cells = [method, f"{line['bytes']['joint'] / 1000:,.0f}", f"{four / 1000:,.0f}"]
        for images in ("1 images", "16 images"):
            found = line[images]
            low, middle, high = found["four ÷ joint"]
            cells += [f"{found['joint'][1]:.2f}", f"{found['four'][1]:.2f}", f"{middle:.2f} ({low:.2f}–{high:.2f})"]
        body.append(cells)
    head = ["method", "kB, one", "kB, four", *(f"{what}, {n}" for n in ("1 image", "16 images") for what in
            ("ms per answer, one", "four", "four ÷ one"))]  # fmt: skip
    return table(head, body) if body else NOTHING


def coverage_table(rows: Rows) -> str:
    """Return the share of images whose answer by `--coverage 0.95` holds the true one, and how large it is."""
    body = []
    for key, seeds in rows.items():
        trained = [lines[0]["figures"] for lines in seeds.values()] if key.form in COVERED else []
        for part in STYLES:
            for label in trained[0].get(part, ()) if trained else ():
                told = [one[part][label] for one in trained if "covered" in one[part][label]]
                if told:
                    title = TITLES.get(key.form, key.form.replace("_", " "))
                    sizes = spread([one["size"] for one in told], 2) + (" classes" if "top1" in told[0] else " aside")
                    covered = spread([100 * one["covered"] for one in told])
                    body.append([key.augmented, key.method, title, part, label, covered, sizes, str(len(told))])
    head = ["augmented", "method", "form", "images", "label", "covered (%)", "mean size", "seeds"]
    return table(head, sorted(body), 5) if body else NOTHING


def blocks(lines: Sequence[Line]) -> dict[str, str]:
    """Return the tables of the page by their names."""
    rows = rows_of(lines)
    digests = ", ".join(sorted({line["pictures"] for line in lines if "pictures" in line}))
    machines = sorted(
        {f"{m['cpu']}, {m['threads']} thread, torch {m['torch']}" for m in (one["machine"] for one in lines)}
    )
    return {
        "machine": f"{'; '.join(machines)}; digests of scenes and gauges {digests}" if machines else NOTHING,
        **{f"accuracy {part}": accuracy_table(rows, part) for part in STYLES},
        "differences": difference_table(rows),
        "gauges": gauge_table(rows),
        "numbers": number_table(rows),
        "answers": answer_table(lines),
        "coverage": coverage_table(rows),
    }


def page(tables: Mapping[str, str]) -> str:
    """Return the page with these tables between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    for name, one in tables.items():
        before, rest = text.split(f"<!-- {name}: benchmarks/several_tasks_page.py -->\n")
        after = rest.split("<!-- to here -->\n", 1)[1]
        text = f"{before}<!-- {name}: benchmarks/several_tasks_page.py -->\n\n{one}\n\n<!-- to here -->\n{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(blocks(read_lines(RESULTS))), encoding="utf-8")
