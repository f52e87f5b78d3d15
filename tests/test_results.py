"""The published results: every number on the page comes from a line in results/, and the lines hold up."""

import runpy
from pathlib import Path

from visgraft.bench.evidence import check_evidence
from visgraft.bench.ledger import read_results

ROOT = Path(__file__).parents[1]


def test_the_page_shows_what_the_lines_say() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))
    assert script["page"]() == (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), (
        "run: python benchmarks/results_page.py"
    )


def test_settings_were_chosen_on_validation_images_and_sources_are_named() -> None:
    found = read_results([ROOT / "results"])
    check_evidence(found)
    finals = [result for result in found if result.trial.kind == "final"]
    assert finals
    tuned = {result.trial.key for result in found if result.trial.kind == "tune"}
    for result in finals:
        assert result.selection["rule"] == "validation" and set(result.trial.chosen_from) <= tuned
        assert result.revision and len(result.backbone_digest) == 64
