"""Put the tables of results/ into docs/results.md, between its marks.

    python benchmarks/results_page.py

`visgraft bench table results` prints the same. A test compares the page with the lines in results/.
"""

from pathlib import Path

from visgraft.bench.ledger import read_results
from visgraft.bench.table import markdown
from visgraft.protocols import PROTOCOLS

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "results"
BEGIN, END = "<!-- printed by benchmarks/results_page.py -->\n", "<!-- to here -->\n"


def page() -> str:
    """Return the page with the tables of the results there are now."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    order = [task.name for protocol in PROTOCOLS.values() for task in protocol.tasks]
    tables = markdown(read_results([RESULTS]), order).replace("\n### ", "\n## ").replace("### ", "## ", 1)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
