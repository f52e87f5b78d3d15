"""The simulation of work larger than one machine, against what can be worked out by hand. It never imports torch."""

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scale() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import scale_simulated

        yield scale_simulated
    finally:
        sys.path.remove(str(BENCHMARKS))


def equal(scale: Any, count: int, **values: Any) -> Any:
    """A work of equal parts, side by side."""
    return [[[scale.Part(**{"decoding": 3.0, "forwarding": 5.0, "bytes": 100.0} | values)] * count]]


def test_it_needs_no_torch() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import scale_simulated; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("cluster", "part", "seconds"),
    [
        ({}, {}, 5.0),
        ({}, {"overlapped": False}, 8.0),
        ({"driver": 2.0}, {"starting": 1.0}, 2 + 1 + 5.0),
        ({"network": 10.0}, {}, 10.0),
        ({"network": 10.0, "places": 4}, {}, 40.0 / 4),
        ({"storage": 4.0}, {}, 25.0),
    ],
)
def test_one_node_without_failures_takes_the_sum_of_its_parts(
    scale: Any, cluster: dict[str, Any], part: dict[str, Any], seconds: float
) -> None:
    found = scale.simulate(equal(scale, 40, **part), scale.Cluster(1, **cluster))
    assert found.hours == pytest.approx(40 * seconds / 3600)
    assert (found.lost, found.failed) == (0.0, 0)


@pytest.mark.parametrize(
    ("cluster", "part", "named"),
    [
        ({}, {}, "forwarding"),
        ({}, {"decoding": 6.0}, "decoding"),
        ({"network": 10.0}, {}, "network"),
        ({"storage": 4.0}, {}, "storage"),
        ({"driver": 7.0}, {}, "driver"),
    ],
)
def test_the_bound_is_the_largest_term(scale: Any, cluster: dict[str, Any], part: dict[str, Any], named: str) -> None:
    work, found = equal(scale, 64, **part), scale.Cluster(1, **cluster)
    needed = scale.terms(work, found)
    assert scale.bound(work, found) == named
    assert needed[named] == max(needed.values())
    assert scale.simulate(work, found).hours >= needed[named] - 1e-12


def test_doubling_the_nodes_halves_the_hours_until_the_bound_that_all_share(scale: Any) -> None:
    work = equal(scale, 1024)
    for shared, named in (({"storage": 400.0}, "storage"), ({"driver": 0.25}, "driver")):
        # 100 bytes at 400 a second, and a driver's quarter of a second, allow 4 parts a second: 20 nodes of 5 s each
        assert scale.terms(work, scale.Cluster(1, **shared))[named] == pytest.approx(1024 / 4 / 3600)
        hours = [scale.simulate(work, scale.Cluster(2**power, **shared)).hours for power in range(9)]
        names = [scale.bound(work, scale.Cluster(2**power, **shared)) for power in range(9)]
        assert names == ["forwarding"] * 5 + [named] * 4
        for fewer, more in itertools.pairwise(hours[:5]):
            assert more == pytest.approx(fewer / 2, rel=0.05)
        for found in hours[5:]:
            assert found == pytest.approx(1024 / 4 / 3600, rel=0.03)


def test_a_chain_takes_its_stages_one_after_another_however_many_nodes_there_are(scale: Any) -> None:
    first, second = scale.Part(0.0, 10.0, 0.0), scale.Part(0.0, 7.0, 0.0)
    work = [[[first] * 4, [second] * 3]] * 5
    many = scale.Cluster(1000)
    assert scale.simulate(work, many).hours == pytest.approx(17 / 3600)
    assert scale.bound(work, many) == "longest chain"
    assert scale.simulate(work, scale.Cluster(1)).hours == pytest.approx(5 * (40 + 21) / 3600)


def test_failures_only_add_and_the_same_seed_gives_the_same(scale: Any) -> None:
    work, often = equal(scale, 400, forwarding=360.0), (math.inf, 100.0, 10.0, 1.0)
    for nodes in (1, 16):
        found = [scale.simulate(work, scale.Cluster(nodes, failure_hours=h, away=60.0), seed=3) for h in often]
        assert found == [scale.simulate(work, scale.Cluster(nodes, failure_hours=h, away=60.0), seed=3) for h in often]
        assert [one.hours for one in found] == sorted(one.hours for one in found)
        assert [one.lost for one in found] == sorted(one.lost for one in found)
        # a part of 0.1 h that fails after a mean of 1 h: 1 - exp(-0.1) of the tries, each losing nearly half of it
        tries = 1 / math.exp(-0.1)
        lost = (1 - 1.1 * math.exp(-0.1)) * tries
        assert found[-1].lost == pytest.approx(lost / (lost + 0.1), rel=0.35)


def test_what_is_lost_too_often_has_failed_and_so_has_what_waits_for_it(scale: Any) -> None:
    part = scale.Part(0.0, 3600.0, 0.0)
    hopeless = scale.Cluster(4, failure_hours=0.001)
    assert scale.simulate([[[part] * 4, [part] * 3]], hopeless).failed == 7
    assert scale.simulate([[[part], [part]]], replace(hopeless, failure_hours=math.inf)).failed == 0


def test_a_sample_of_equal_parts_stands_for_all(scale: Any) -> None:
    part = scale.Part(0.0, 36.0, 0.0)
    scenario = scale.Scenario("", [[[part]]], scale.Cluster(1), 1e6)
    for nodes in (1, 100):
        found, named = scenario.outcome(nodes)
        assert found.hours == pytest.approx(1e6 * 36 / 3600 / nodes)
        assert named == "forwarding"


def test_the_sweep_has_the_trials_that_were_measured(scale: Any) -> None:
    figures = scale.measured()
    scenario = scale.protocol(figures, scale.options().parse_args([]), on_gpu=True)
    assert sum(len(stage) for chain in scenario.work for stage in chain) == figures["trials of VTAB-1k"] == 2128


def test_a_faster_gpu_shortens_answering_until_decoding_bounds_it(scale: Any) -> None:
    def outcome(*words: str) -> Any:
        asked = scale.options().parse_args(["--network", "1e6", "--storage", "1e6", *words])
        return scale.answering(scale.measured(), asked, on_gpu=True)[0].outcome(1)

    slow, named = outcome("--gpu-images-per-second", "100")
    fast, then = outcome("--gpu-images-per-second", "1e9")
    assert (named, then) == ("forwarding", "decoding")
    assert slow.hours == pytest.approx(1e9 / 100 / 3600, rel=0.3)
    more, _ = outcome("--gpu-images-per-second", "1e9", "--cores", "32")
    assert more.hours == pytest.approx(fast.hours / 2, rel=0.01)


def test_the_page_holds_what_the_scripts_print(scale: Any) -> None:
    import scale_page

    asked = scale.options().parse_args([])
    assert scale_page.page(scale_page.blocks(asked)) == scale_page.PAGE.read_text(encoding="utf-8"), (
        "run: python benchmarks/scale_page.py"
    )
