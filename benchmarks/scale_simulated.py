"""How long would work far larger than one machine take, what bounds it, what do failing nodes cost?

    python benchmarks/scale_simulated.py                                  # the tables of docs/scale.md, some seconds
    python benchmarks/scale_simulated.py --gpu-images-per-second 10000 --cores 64 --jpeg 256

Two works: a billion images that one of 1,000 adapters, or each of them, answers; and VTAB-1k with 16 methods. What one
core does, what a JPEG, an adapter and an answer take, and what a driver and a process cost was measured
(scale_measured.jsonl); everything else is an option here, with its default assumed.

Parts of the work wait in one queue. A node takes one as soon as it is free, which takes the driver's time, one part
after another; it is done when the node has computed it and the storage, which serves parts in turn, has given its
bytes. A node fails at random, on average once in so many hours: the part that it works on is lost and goes to the end
of the queue, and the node is back after a while. What is lost more often than a cluster's executor allows has failed.
"""

import argparse
import heapq
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from visgraft.executors.on_ray import LOST
from visgraft.protocols.vtab import VTAB

FILE = Path(__file__).parent / "scale_measured.jsonl"
NODES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
FAILURE_HOURS = (math.inf, 1000.0, 100.0, 10.0)
IMAGES, ADAPTERS, METHODS, TUNED, SEEDS, EPOCHS = 10**9, 1000, 16, 4, 3, 100
MODEL = "ViT-B/16 at 224 px"
ROUNDS = 50
"""Of a work of equal parts, so many for each place are simulated; the others are begun as the second half of those."""


@dataclass(frozen=True)
class Part:
    """A piece of work: seconds of a place's cores, of its processor for models, and to start; bytes read and written.

    Cores and network work ahead of a GPU (`overlapped`); otherwise one follows the other.
    """

    decoding: float
    forwarding: float
    bytes: float
    starting: float = 0.0
    overlapped: bool = True


Work = Sequence[Sequence[Sequence[Part]]]
"""Chains of stages: the parts of a stage can be done side by side, once those of the stage before are done."""


@dataclass(frozen=True)
class Cluster:
    """Nodes with places for one part each; bytes a second of each node and of the storage for all; what a driver takes.

    `failure_hours` is the mean time between failures of a node, `away` the seconds until it, or another, is there.
    """

    nodes: int
    places: int = 1
    network: float = math.inf
    storage: float = math.inf
    driver: float = 0.0
    drivers: int = 1
    failure_hours: float = math.inf
    away: float = 0.0

    @property
    def at_a_time(self) -> int:
        """Parts that run at a time."""
        return self.nodes * self.places

    def seconds(self, part: Part) -> float:
        """Return how long a part takes in a place, if neither storage nor driver keeps it waiting."""
        network = part.bytes * self.places / self.network
        alone = (part.decoding, part.forwarding, network)
        return part.starting + (max(alone) if part.overlapped else max(part.decoding + part.forwarding, network))


@dataclass(frozen=True)
class Outcome:
    """Hours until all is done, the share of the nodes' work that was lost, how many parts were never done.

    `second_half` are the hours from the beginning of the part in the middle to that of the last one.
    """

    hours: float
    lost: float
    failed: int
    second_half: float


def terms(work: Work, cluster: Cluster) -> dict[str, float]:
    """Return the hours that each resource needs for all of the work, were it the only one: the largest bounds it."""
    parts = [part for chain in work for stage in chain for part in stage]
    each = cluster.at_a_time
    found = {
        "decoding": sum(part.decoding for part in parts) / each,
        "forwarding": sum(part.forwarding for part in parts) / each,
        "network": sum(part.bytes for part in parts) / cluster.network / cluster.nodes,
        "storage": sum(part.bytes for part in parts) / cluster.storage,
        "driver": len(parts) * cluster.driver / cluster.drivers,
        "longest chain": max(sum(max(map(cluster.seconds, stage)) for stage in chain if stage) for chain in work),
    }
    return {name: seconds / 3600 for name, seconds in found.items()}


def bound(work: Work, cluster: Cluster) -> str:
    """Return which resource bounds the work."""
    found = terms(work, cluster)
    return max(found, key=lambda name: found[name])


def simulate(work: Work, cluster: Cluster, seed: int = 0) -> Outcome:
    """Do the work, event by event."""
    rng, order = np.random.default_rng(seed), count()
    ready = deque((part, chain, 0, 0) for chain, stages in enumerate(work) for part in stages[0])
    left = [len(stages[0]) for stages in work]
    free, now, end = cluster.at_a_time, 0.0, 0.0
    drivers, storage = [0.0] * cluster.drivers, 0.0
    events: list[tuple[float, int, str, tuple[Part, int, int, int] | None]] = []
    lost_seconds, done_seconds, failed, begun = 0.0, 0.0, 0, list[float]()
    while ready or events:
        while free and ready:
            given = ready.popleft()
            begin = max(now, drivers[0]) + cluster.driver
            heapq.heapreplace(drivers, begin)
            begun += [begin] if given[3] == 0 else []
            storage = max(storage, begin) + given[0].bytes / cluster.storage
            ended = max(begin + cluster.seconds(given[0]), storage)
            fails = (
                begin + rng.exponential(3600 * cluster.failure_hours) if math.isfinite(cluster.failure_hours) else ended
            )
            free -= 1
            if fails < ended:
                lost_seconds += fails - begin
                heapq.heappush(events, (fails, next(order), "lost", given))
            else:
                done_seconds += ended - begin
                heapq.heappush(events, (ended, next(order), "done", given))
        now, _, kind, one = heapq.heappop(events)
        if kind == "back" or one is None:
            free += 1
            continue
        part, chain, stage, times = one
        end = now
        if kind == "lost":
            heapq.heappush(events, (now + cluster.away, next(order), "back", None))
            if times < LOST:
                ready.appendleft((part, chain, stage, times + 1))
            else:
                failed += 1 + sum(map(len, work[chain][stage + 1 :])) * (left[chain] >= 0)
                left[chain] = -1  # what waits for the stage is never begun
            continue
        free += 1
        left[chain] -= 1
        if left[chain] == 0 and stage + 1 < len(work[chain]):
            left[chain] = len(work[chain][stage + 1])
            ready.extend((part, chain, stage + 1, 0) for part in work[chain][stage + 1])
    second_half = begun[-1] - begun[(len(begun) - 1) // 2]
    lost = lost_seconds / max(lost_seconds + done_seconds, 1e-12)
    return Outcome(end / 3600, lost, failed, second_half / 3600)


@dataclass(frozen=True)
class Scenario:
    """A work by its title: its parts, how many of them stand for how many, and the cluster of one node."""

    title: str
    work: Work
    cluster: Cluster
    parts: float = 0.0
    """Of equal parts, how many there are; 0: those of `work`."""

    def outcome(self, nodes: int, failure_hours: float = math.inf, seed: int = 0) -> tuple[Outcome, str]:
        """Return what becomes of the work on so many nodes, and what bounds it."""
        cluster = replace(self.cluster, nodes=nodes, failure_hours=failure_hours)
        if not self.parts:
            return simulate(self.work, cluster, seed), bound(self.work, cluster)
        places = cluster.at_a_time
        simulated = 2 * places * math.ceil(max(1000, ROUNDS * places / 2) / places)
        if simulated > self.parts:
            simulated = math.ceil(self.parts)
        work, scale = [[[self.work[0][0][0]] * simulated]], self.parts / simulated
        found, needed = simulate(work, cluster, seed), terms(work, cluster)
        needed |= {name: scale * value for name, value in needed.items() if name != "longest chain"}
        all_of_it = found.hours + 2 * (scale - 1) * found.second_half if scale > 1 else found.hours
        whole = replace(found, hours=all_of_it, failed=round(scale * found.failed))
        return whole, max(needed, key=lambda name: needed[name])


def best_lines(file: Path = FILE, cpu: str | None = None) -> list[dict[str, Any]]:
    """Return the best line of every figure of one processor: the first in the file, unless it is named."""
    found: dict[str, dict[str, Any]] = {}
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        cpu = cpu or line["cpu"]
        sign = -1 if line["unit"] == "images/s" else 1
        known = found.get(line["name"], line)
        if line["cpu"] == cpu:
            found[line["name"]] = line if sign * line["value"] < sign * known["value"] else known
    if not found:
        raise SystemExit(f"{file} holds no figures of {cpu}; run benchmarks/scale_measured.py on it")
    return list(found.values())


def measured(file: Path = FILE, cpu: str | None = None) -> dict[str, float]:
    """Return the best value of every figure of one processor."""
    return {line["name"]: line["value"] for line in best_lines(file, cpu)}


def answering(figures: Mapping[str, float], asked: argparse.Namespace, on_gpu: bool) -> list[Scenario]:
    """Return the billion images: one of the adapters for each, and each of the adapters, of three kinds."""
    side, plain = asked.jpeg, 1 / figures[f"forwarded, {MODEL}"]
    decoding = 1 / figures[f"decoded, {side} px"] + 1 / figures[f"resized and normalised, {side} px"]
    # Differences leave out what each call of a bank takes, such as converting weights, which large batches make small.
    one_each = figures[f"1 adapter, linear, {MODEL}"]
    mixed = max(figures[f"4 mixed adapters, {MODEL}"] - one_each, 0.0)
    works = {"one of 1,000 adapters for each image": (plain + mixed, 1)}
    for kind in ("linear", "alore in the last 2 blocks", "alore in all blocks"):
        further = max(figures[f"4 adapters, {kind}, {MODEL}"] - one_each, 0.0) / 3
        works[f"1,000 adapters for each image: {kind}"] = (plain + (ADAPTERS - 1) * further, ADAPTERS)
    speed = asked.gpus * asked.gpu_images_per_second * plain if on_gpu else asked.cores
    driver = figures["job, ray, process kept"] + figures["line of the ledger"]
    cluster = Cluster(1, 1, asked.network * 1e9 / 8, asked.storage * 1e9, driver, asked.drivers, away=60 * asked.away)
    found = []
    for title, (seconds, answers) in works.items():
        size = figures[f"JPEG of {side} px"] + answers * figures["answer, parquet"]
        one = Part(decoding / asked.cores, seconds / speed, size)
        one = one if on_gpu else replace(one, overlapped=False)
        images = max(1, math.floor(60 * asked.part_minutes / cluster.seconds(one)))
        stored = ADAPTERS * figures[f"adapter alore, {MODEL}"]
        part = replace(
            one, decoding=images * one.decoding, forwarding=images * one.forwarding, bytes=images * size + stored
        )
        found.append(Scenario(title, [[[part]]], cluster, IMAGES / images))
    return found


def protocol(figures: Mapping[str, float], asked: argparse.Namespace, on_gpu: bool) -> Scenario:
    """Return VTAB-1k: for each task and method the trials that choose a setting, then one for each seed."""
    side, places = asked.vtab_jpeg, asked.gpus if on_gpu else asked.cores
    decoding = 1 / figures[f"decoded, {side} px"] + 1 / figures[f"resized and normalised, {side} px"]
    speed = asked.gpu_images_per_second / figures[f"forwarded, {MODEL}"] if on_gpu else 1.0
    kept, fresh = figures["job, ray, process kept"], figures["job, ray, fresh process"]

    def trial(learned: int, answered: int) -> Part:
        seconds = learned * EPOCHS / figures[f"trained alore, {MODEL}"] + answered / figures[f"forwarded, {MODEL}"]
        images = learned + answered
        each = decoding * places / asked.cores  # a place's share of the cores
        return Part(images * each, seconds / speed, images * figures[f"JPEG of {side} px"], fresh - kept, False)

    cells = []
    for task in VTAB.tasks:
        train, val, test = (task.images[part] for part in ("train", "val", "test"))
        cells += [[[trial(train, val)] * TUNED, [trial(train + val, test)] * SEEDS]] * METHODS
    driver = figures["driver, trial of VTAB-1k"] + kept
    network, storage = asked.network * 1e9 / 8, asked.storage * 1e9
    cluster = Cluster(1, places, network, storage, driver, asked.drivers, away=60 * asked.away)
    return Scenario("VTAB-1k: 19 tasks, 16 methods, 2,128 trials", cells, cluster)


def hours(value: float) -> str:
    """Write a figure with three digits."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def tables(scenarios: Sequence[Scenario], price: float, nodes: Sequence[int] = NODES) -> str:
    """Return a Markdown table for each work: hours, bound and money without failures, then hours with them."""
    head = ["nodes", "hours", "bound", "money", *(f"a failure in {h:g} h: hours, lost" for h in FAILURE_HOURS[1:])]
    found = []
    for scenario in scenarios:
        rows = []
        for number in nodes:
            best, named = scenario.outcome(number)
            cells = [str(number), hours(best.hours), named, hours(best.hours * number * price)]
            for often in FAILURE_HOURS[1:]:
                one, _ = scenario.outcome(number, often)
                never = f", {one.failed:,} never done" if one.failed else ""
                cells.append(f"{hours(one.hours)}, {100 * one.lost:.1f} %{never}")
            rows.append(cells)
        lines = [head, ["--:" if name != "bound" else "---" for name in head], *rows]
        found.append(f"**{scenario.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(found)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = "images that one GPU forwards through ViT-B/16 at 224 px each second; 2787: an RTX 4090 in timm's own table"
    parser.add_argument("--gpu-images-per-second", type=float, default=2787, help=gpu)
    parser.add_argument("--cpu", help="processor, as in the file; none: the first")
    parser.add_argument("--cores", type=int, default=16, help="cores of a node")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a node that has any")
    parser.add_argument("--network", type=float, default=10, help="Gbit/s of each node")
    parser.add_argument("--storage", type=float, default=10, help="GB/s of the shared storage, for all nodes")
    parser.add_argument("--jpeg", type=int, default=500, choices=(256, 500, 1000), help="pixels of an image's side")
    parser.add_argument("--vtab-jpeg", type=int, default=256, choices=(256, 500, 1000), help="the same for VTAB-1k")
    parser.add_argument("--part-minutes", type=float, default=10, help="how long a node answers one part")
    parser.add_argument("--away", type=float, default=10, help="minutes until a node that failed is back")
    parser.add_argument("--drivers", type=int, default=1)
    parser.add_argument("--price", type=float, default=1, help="of an hour of a node")
    return parser


def scenarios(asked: argparse.Namespace) -> dict[str, list[Scenario]]:
    """Return the works by what their nodes are."""
    figures = measured(cpu=asked.cpu)
    kinds = {f"nodes of {asked.cores} cores and {asked.gpus} GPU": True, f"nodes of {asked.cores} cores": False}
    return {
        kind: [*answering(figures, asked, on_gpu), protocol(figures, asked, on_gpu)] for kind, on_gpu in kinds.items()
    }


def main() -> None:
    asked = options().parse_args()
    for kind, found in scenarios(asked).items():
        print(f"## {kind}\n\n{tables(found, asked.price)}\n")


if __name__ == "__main__":
    main()
