"""The report: one self-contained HTML page on one or several adapters."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visgraft.adapters.directory import CONFIG, read_record
from visgraft.adapters.hub import on_hub, settled
from visgraft.data.images import Loading
from visgraft.data.read import AnySource
from visgraft.data.tasks import LabelTask, figure_name, written
from visgraft.errors import AdapterError, VisgraftError, nearest
from visgraft.files import new_file
from visgraft.measure.evaluation import is_multi_label
from visgraft.report import compare
from visgraft.report.section import PART_NAMES, ReportedRun, RunSection, Say, make_section
from visgraft.report.task_rows import TaskRow, task_rows

_DEFAULT_LOADING = Loading()
MARKER = '<meta name="generator" content="visgraft report">'


@dataclass(frozen=True)
class ReportPage:
    """All that the page says, best run first; `differences` are those of the best run to each one.

    `part` is "validation" or "test", `data` the data's name, empty where nothing was measured, and `figure` what runs
    are compared by.
    """

    part: str
    data: str
    figure: str
    verdict: str
    notes: list[str]
    differences: list[compare.Lead | None]
    task_rows: list[TaskRow]
    sections: list[RunSection]
    classes: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table that compares the runs, as plain JSON values."""
        rows = [dataclasses.asdict(section.row) for section in self.sections]
        return [{name: value for name, value in row.items() if name != "tasks" or value} for row in rows]

    @property
    def tasks(self) -> tuple[LabelTask, ...]:
        """What is asked, where that are several things."""
        return self.sections[0].record.tasks


def build_report(
    runs: Sequence[str | Path],
    data: AnySource | None = None,
    *,
    weights: str | None = None,
    part: str = "val",
    loading: Loading = _DEFAULT_LOADING,
    on_step: Say | None = None,
) -> str:
    """Return an HTML page on adapters: how they learned, what they reach, where they fail, what they cost.

    Args:
        runs: folders that `train` or `save` wrote, all with the same classes.
        data: the data to measure them on; None: the page shows what the adapters themselves hold.
        weights: where the backbones' weights come from, in place of what the adapters say.
        part: `val`, or `test` for a last, single look.
        loading: how images are read.
        on_step: called with a line on what is done next.

    Raises:
        AdapterError: a run is no adapter, or its classes are not those of the others or of the data.
        VisgraftError: the data or the weights cannot be used.
    """
    return render(gather(runs, data, weights=weights, part=part, loading=loading, on_step=on_step))


@settled()
def gather(
    runs: Sequence[str | Path],
    data: AnySource | None = None,
    *,
    weights: str | None = None,
    part: str = "val",
    loading: Loading = _DEFAULT_LOADING,
    on_step: Say | None = None,
) -> ReportPage:
    """Measure and draw all that `build_report` puts on the page; arguments and errors are the same."""
    if part not in PART_NAMES:
        raise VisgraftError(f"split is {part!r}, but must be one of {', '.join(PART_NAMES)}{nearest(part, PART_NAMES)}")
    known, say = _read(runs), on_step or (lambda text: None)
    made = [make_section(run, f"run-{i}", data, weights, part, loading, say) for i, run in enumerate(known, 1)]
    sections = sorted(made, key=lambda section: (section.row.figure is None, -(section.row.figure or 0)))
    leads = [_leads(sections[0], section) for section in sections]
    differences = [whole for whole, _ in leads]
    figure = "mean average precision" if any(section.row.multi_label for section in sections) else "top-1"
    figure = figure_name(sections[0].record.tasks) if sections[0].record.tasks else figure
    return ReportPage(
        part=PART_NAMES[part],
        data="" if data is None else Path(str(data)).name,
        figure=figure,
        verdict=compare.verdict([section.row for section in sections], figure, differences, PART_NAMES[part]),
        notes=_notes(sections, differences, part),
        differences=differences,
        task_rows=task_rows([section.row for section in sections], [each for _, each in leads], known[0].record.tasks),
        sections=sections,
        classes=known[0].classes,
    )


def _read(runs: Sequence[str | Path]) -> list[ReportedRun]:
    """Read all configurations before anything is measured, and name the runs by their folders."""
    paths = list(dict.fromkeys(Path(run) for run in runs))
    if not paths:
        raise VisgraftError("there are no runs to report on; pass folders that `visgraft train` wrote")
    for path in paths:
        if not on_hub(path) and path.exists() and not (path / CONFIG).is_file():
            raise AdapterError(
                f"{path} is not an adapter: {CONFIG} is missing; if it holds the images, pass --data {path}"
            )
    names = [str(path) if on_hub(path) else path.resolve().name for path in paths]
    unique = len(set(names)) == len(names)
    found = [
        ReportedRun(name if unique else str(path), path, read_record(path))
        for name, path in zip(names, paths, strict=True)
    ]
    for run in found:
        if run.classes != found[0].classes:
            raise AdapterError(
                f"the classes of {run.path} are not those of {found[0].path}, so the two cannot be compared; "
                "report on each alone"
            )
        if _asked(run) != _asked(found[0]):
            raise AdapterError(
                f"{run.path} does not answer the same tasks as {found[0].path}, so the two cannot be compared; report "
                "on each alone"
            )
    return found


def _asked(run: ReportedRun) -> list[tuple[str, str]]:
    return [(task.name, task.kind) for task in run.record.tasks]


def _leads(best: RunSection, other: RunSection) -> tuple[compare.Lead | None, dict[str, compare.Lead]]:
    """The paired difference to another run, and that in each of several tasks; None and {} where there is none.

    That is where there is no other run, or not the same images.
    """
    seen, others = best.seen, other.seen
    if best is other or seen is None or others is None or seen.paths != others.paths:
        return None, {}
    if is_multi_label(seen.evaluation) != is_multi_label(others.evaluation):
        return None, {}
    if best.record.tasks:
        return compare.task_leads(seen.evaluation, others.evaluation, best.record.tasks, seen.members)
    return compare.paired_difference(seen.evaluation, others.evaluation, seen.members), {}


def _notes(sections: Sequence[RunSection], differences: Sequence[compare.Lead | None], part: str) -> list[str]:
    """What a reader must know to take the table for what it is."""
    notes, measured = [], sections[0].seen is not None
    prints = {section.record.fingerprint for section in sections}
    if len(prints) > 1:
        notes.append("The runs were trained on different data (see the fingerprints), which may be why they differ.")
    if measured and len(sections) > 1 and None in differences[1:]:
        notes.append("Some runs hold out other images than the best one, so they cannot be compared image by image.")
    if measured and any(section.seen and section.seen.grouped for section in sections):
        notes.append("Images of one group are alike, so they count together in the intervals.")
    if part == "val" and any(section.record.training.get("select") == "val" for section in sections):
        notes.append("Runs that kept the epoch best on the validation images look slightly better here than they are.")
    if len(sections) > 1:
        notes.append("Each run is one training: with another seed its figure would differ somewhat.")
    if not measured:
        notes.append(
            "The figures are those recorded at the end of training. With --data, this page also compares the runs on "
            "the same images and shows confusions, calibration, the worst mistakes, every class and group, and what "
            "the method does inside the backbone."
        )
    return notes


def render(report: ReportPage) -> str:
    """Return the page as HTML with all pictures inside; every text is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("visgraft", "report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, lstrip_blocks=True)
    environment.filters |= {
        "percent": compare.percent,
        "signed": compare.signed,
        "number": _number,
        "short": _short,
        "apart": _apart,
    }
    return environment.get_template("template.html").render(report=report, marker=MARKER)


def _number(value: float | None, unit: str = "", scale: float = 1.0, digits: int = 0) -> str:
    """A number with thousands separated, divided by `scale`, and its unit; a dash for None."""
    return "–" if value is None else f"{value / scale:,.{digits}f}{' ' if unit else ''}{unit}"


def _short(value: float | None) -> str:
    """A number of any size with four digits that count, and a minus sign; a dash for None."""
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def _apart(value: float, spread: float) -> str:
    """A number with as many digits as tell those apart that scatter by `spread`, and a minus sign."""
    return written(value, spread).replace("-", "−")


def check_page(path: Path) -> None:
    """Raise a VisgraftError unless `path` is free, or an earlier report, in a folder that exists."""
    if not path.parent.is_dir():
        raise VisgraftError(f"the folder {path.parent} does not exist; create it, or choose another --out")
    if path.is_dir():
        raise VisgraftError(f"{path} is a folder; choose a file, e.g. --out {path / 'report.html'}")
    if path.exists() and MARKER.encode() not in path.read_bytes()[:1000]:
        raise VisgraftError(f"{path} exists and is not an earlier report; choose another --out")


def write_page(path: Path, page: str) -> Path:
    """Write the page atomically; an earlier report there is replaced.

    Raises:
        VisgraftError: `path` holds something else, or cannot be written.
    """
    check_page(path)
    try:
        with new_file(path) as file:
            file.write(page.encode("utf-8", "replace"))  # a file name that is not UTF-8 must not cost the page
    except OSError as error:
        raise VisgraftError(f"{path} cannot be written ({error.strerror}); choose another --out") from error
    return path
