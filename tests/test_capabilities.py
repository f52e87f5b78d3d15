"""The page of what works where says what the probe finds."""

from capabilities import COLUMNS, MERGES, PAGE, REFUSED, WORKS, page, probe
from support import CONFIGS, FAMILIES, REFUSALS


def test_the_page_is_what_the_probe_finds_and_the_laws_refuse_the_same() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(), "docs/capabilities.md is out of date; run: python tests/capabilities.py"
    kinds = set(COLUMNS.values())
    expected = {(CONFIGS[name].method, kind) for name, kind in REFUSALS if name.endswith("-0") and kind in kinds}
    methods = {CONFIGS[name].method for name in CONFIGS}
    found = {(method, kind) for method in methods for kind in kinds if probe(method, kind)[0] == REFUSED}
    assert found == expected
    assert set(FAMILIES) - kinds == {"deit_distilled", "convnext_conv"}


def test_the_probe_tells_the_three_outcomes_apart() -> None:
    assert probe("alore", "plain") == (MERGES, "")
    assert probe("sct", "plain")[0] == WORKS
    assert "stream.mid" in probe("sct", "plain")[1]
    outcome, reason = probe("vpt_deep", "swin")
    assert outcome == REFUSED
    assert "tokens.in" in reason
