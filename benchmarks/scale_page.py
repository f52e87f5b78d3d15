"""Put what was measured and simulated into docs/scale.md, between its marks, and draw docs/scale.png.

    python benchmarks/scale_page.py

`scale_measured.py` measures; `scale_simulated.py` prints the same for other numbers of nodes and other assumptions. A
test compares the page with the lines in scale_measured.jsonl.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_simulated import FAILURE_HOURS, NODES, Scenario, best_lines, hours, measured, options, scenarios

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "scale.md", ROOT / "docs" / "scale.png"
SHOWN, FAILING = (1, 10, 100, 1000), 100
MARKERS = {
    "forwarding": "o", "decoding": "s", "network": "v", "storage": "D", "driver": "P", "longest chain": "X",
}  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first columns are aligned to the left."""
    rule = ["---" if number < left else "--:" for number in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def measured_table(cpu: str | None = None) -> str:
    """Return every figure of a processor."""
    lines = best_lines(cpu=cpu)
    rows = [[line["name"], f"{line['value']:,.4g}" if line["value"] < 1e4 else f"{line['value']:,.0f}", line["unit"]]
            for line in lines]  # fmt: skip
    first = lines[0]
    told = f"{first['cpu']}, 1 thread, {first['precision']}, torch {first['torch']}, timm {first['timm']}"
    return f"{told}\n\n{table(['', 'best', 'unit'], rows)}"


def feeding_table(figures: Mapping[str, float], asked: argparse.Namespace) -> str:
    """Return what a GPU of the assumed speed needs of cores, network and storage, by the size of the JPEGs."""
    rows = []
    for side in (256, 500, 1000):
        core = 1 / (1 / figures[f"decoded, {side} px"] + 1 / figures[f"resized and normalised, {side} px"])
        stream = asked.gpu_images_per_second * figures[f"JPEG of {side} px"]
        cores, gbit, gpus = asked.gpu_images_per_second / core, stream * 8 / 1e9, asked.storage * 1e9 / stream
        rows.append([f"{side} px", f"{core:.0f}", f"{cores:.0f}", f"{gbit:.2g}", f"{gpus:.0f}"])
    head = ["JPEG", "images/s of one core", "cores for one GPU", "Gbit/s of one GPU", "GPUs that the storage feeds"]
    return table(head, rows)


def hours_table(found: Sequence[Scenario], price: float) -> str:
    """Return hours, bound and money without failures."""
    rows = []
    for scenario in found:
        cells = []
        for number in SHOWN:
            outcome, named = scenario.outcome(number)
            cells.append(f"{hours(outcome.hours)} h, {named}, {hours(outcome.hours * number * price)}")
        rows.append([scenario.title, *cells])
    return table(["", *(f"{n:,} node{'s' if n > 1 else ''}" for n in SHOWN)], rows)


def failing_table(found: Sequence[Scenario]) -> str:
    """Return hours and lost work where nodes fail."""
    rows = []
    for scenario in found:
        cells = []
        for often in FAILURE_HOURS:
            outcome, _ = scenario.outcome(FAILING, often)
            never = f", {outcome.failed:,} parts never done" if outcome.failed else ""
            lost = f", {100 * outcome.lost:.1f} % lost" if math.isfinite(often) else ""
            cells.append(f"{hours(outcome.hours)} h{lost}{never}")
        rows.append([scenario.title, *cells])
    return table([f"{FAILING} nodes", "never", *(f"every {h:,.0f} h" for h in FAILURE_HOURS[1:])], rows)


def blocks(asked: argparse.Namespace) -> dict[str, str]:
    """Return the tables of the page by their names."""
    found = {"measured": measured_table(asked.cpu), "feeding": feeding_table(measured(cpu=asked.cpu), asked)}
    for name, works in zip(("gpu", "cpu"), scenarios(asked).values(), strict=True):
        found |= {f"{name} hours": hours_table(works, asked.price), f"{name} failing": failing_table(works)}
    return found


def page(tables: Mapping[str, str]) -> str:
    """Return the page with these tables between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    for name, one in tables.items():
        before, rest = text.split(f"<!-- {name}: benchmarks/scale_page.py -->\n")
        after = rest.split("<!-- to here -->\n", 1)[1]
        text = f"{before}<!-- {name}: benchmarks/scale_page.py -->\n\n{one}\n\n<!-- to here -->\n{after}"
    return text


def draw(found: Sequence[Scenario], title: str) -> None:
    """Draw hours against nodes; the marker says what bounds the work."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import StrMethodFormatter

    from visgraft.bench.plot import COLOURS, DOTS_PER_INCH, INK, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.8), layout="constrained")
        axes: Any = figure.subplots()
        used: dict[str, None] = {}
        for scenario, colour in zip(found, COLOURS, strict=False):
            outcomes = [scenario.outcome(number) for number in NODES]
            values = [outcome.hours for outcome, _ in outcomes]
            axes.plot(NODES, values, color=colour, lw=1.6, label=scenario.title)
            for number, value, (_, named) in zip(NODES, values, outcomes, strict=True):
                axes.plot(number, value, ls="", marker=MARKERS[named], color=colour, ms=6)
                used[named] = None
        axes.set(xscale="log", yscale="log", xlabel="nodes", ylabel="hours", title=title)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.12g}"))
        axes.grid(True, which="major", lw=0.6)
        shapes = [
            Line2D([], [], ls="", marker=MARKERS[name], color=INK, label=name) for name in MARKERS if name in used
        ]
        figure.legend(handles=shapes, title="bound by", loc="outside right upper", fontsize=9)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
        figure.savefig(PICTURE, dpi=DOTS_PER_INCH)


def main() -> None:
    asked = options().parse_args([])
    PAGE.write_text(page(blocks(asked)), encoding="utf-8")
    kind, works = next(iter(scenarios(asked).items()))
    draw(works, f"simulated: {kind}")


if __name__ == "__main__":
    main()
