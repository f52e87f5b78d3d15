"""Copies: the same file twice, or the same picture resized, compressed again, slightly brightened or cropped.

Copies across parts leak: the model is measured on pictures it was trained on. Copies under several classes contradict
each other.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import NearestNeighbors

from visgraft.check.facts import Facts, OnStage
from visgraft.check.findings import DatasetImage, Finding, counted, varied
from visgraft.data.tasks import TaskLabels

CONTRADICTS = 0.1  # standard deviations between the numbers of copies, from which on one of them is wrong
# Chosen on real pictures: of 256 bits, copies (half the size, JPEG quality 30, 25 % brighter, 1 % cropped off each
# side) differ in at most 31, different textiles of one cloth in at least 88, gauges of one style in at least 46.
# Blurred copies, whose fine bits are chance, differ in up to 46.
# The hash is blind to colour: the 16 × 16 miniatures must agree as well, the more so the more bits differ. The copies
# correlate by 0.9 and more, the blurred ones by 0.99; of the gauges within 60 bits, the most alike by 0.95.
ALLOWED = ((32, 0.8), (48, 0.985))  # bits that differ, and the least correlation then
PLAIN = 4.0  # standard deviation of a miniature below which it has nothing to correlate
NEIGHBOURS = 8  # kept per image, so that memory stays bounded where all images are alike
CHUNK = 2000

Sets = list[list[int]]  # positions of images that are copies of one another


def exact_sets(facts: Sequence[Facts]) -> Sets:
    """Return the sets of images with the same bytes."""
    same: dict[bytes, list[int]] = defaultdict(list)
    for position, one in enumerate(facts):
        same[one.digest].append(position)
    return [positions for positions in same.values() if len(positions) > 1]


def near_sets(facts: Sequence[Facts], on_progress: OnStage | None = None) -> Sets:
    """Return the sets of images that look the same but differ in their bytes; of the same bytes, one is taken.

    A set is what hangs together by pairs of near copies, each among the other's eight nearest.
    """
    chosen = list({one.digest: position for position, one in reversed(list(enumerate(facts)))}.values())[::-1]
    if len(chosen) < 2:
        return []
    packed = np.frombuffer(b"".join(facts[i].hash for i in chosen), dtype=np.uint8).reshape(len(chosen), -1)
    bits = np.unpackbits(packed, axis=1).astype(np.float32)
    # On 0 and 1 the squared Euclidean distance is the Hamming distance, and a matrix product finds it fastest.
    # Every image finds itself too, hence one neighbour more.
    index = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(chosen)), algorithm="brute").fit(bits)
    pairs = []
    for start in range(0, len(chosen), CHUNK):
        distances, neighbours = index.kneighbors(bits[start : start + CHUNK])
        differing = np.rint(distances**2).astype(int)
        rows, columns = np.nonzero(differing <= ALLOWED[-1][0])
        found = np.stack([rows + start, neighbours[rows, columns], differing[rows, columns]], axis=1)
        pairs.append(found[found[:, 0] != found[:, 1]])
        if on_progress:
            on_progress("comparing images", min(start + CHUNK, len(chosen)), len(chosen))
    candidates = np.concatenate(pairs).tolist()
    alike = [(i, j) for i, j, bits_off in candidates if looks_alike(facts[chosen[i]], facts[chosen[j]], bits_off)]
    if not alike:
        return []
    rows, columns = np.array(alike).T
    graph = coo_array((np.ones(len(alike), dtype=bool), (rows, columns)), shape=(len(chosen), len(chosen)))
    members = defaultdict(list)
    for position, component in enumerate(connected_components(graph, directed=False)[1].tolist()):
        members[component].append(chosen[position])
    return [positions for positions in members.values() if len(positions) > 1]


def looks_alike(one: Facts, other: Facts, differing: int = 0) -> bool:
    """Whether two miniatures show the same colours in the same places, apart from brightness and contrast.

    `differing` is the number of bits in which the hashes differ.
    """
    first, second = _miniature(one), _miniature(other)
    least = next((correlation for bits, correlation in ALLOWED if differing <= bits), 1.0)
    if min(first.std(), second.std()) < PLAIN:
        return bool(np.abs(first - second).mean() < PLAIN)
    return float(np.corrcoef(first, second)[0, 1]) >= least


def _miniature(facts: Facts) -> NDArray[np.float32]:
    return np.frombuffer(facts.miniature, dtype=np.uint8).astype(np.float32)


@dataclass(frozen=True)
class Copies:
    """The sets of copies among so many images: of the same bytes, and of the same look."""

    exact: Sets
    near: Sets
    images: int

    @property
    def all(self) -> Sets:
        """All sets; one picture can be in one of each kind."""
        return self.near + self.exact

    @property
    def common(self) -> bool:
        """Whether most images look like another one, so that nobody can tell copies from a standing camera."""
        return 2 * sum(map(len, self.near)) > self.images and max(map(len, self.near)) > 10


def find_copies(facts: Sequence[Facts], on_progress: OnStage | None = None) -> Copies:
    """Return all sets of copies."""
    return Copies(exact_sets(facts), near_sets(facts, on_progress), len(facts))


def duplicate_findings(pictures: Sequence[DatasetImage], copies: Copies, drawn: bool) -> list[Finding]:
    """Find copies across parts, under several classes, and within one part; exact and near ones apart.

    `copies` are positions among `pictures`; `drawn` says that the parts were drawn, not given.
    """
    near = _alike_findings if copies.common else _near_findings
    return [*_exact_findings(pictures, copies.exact, drawn), *near(pictures, copies.near, drawn)]


def _exact_findings(pictures: Sequence[DatasetImage], sets: Sets, drawn: bool) -> list[Finding]:
    conflicts, leaks, rest = _sorted_out(pictures, sets)
    findings, (classes, one_class) = [], _words(conflicts + rest)
    if conflicts:
        findings.append(
            Finding(
                "conflict",
                "error",
                f"{counted(len(conflicts), 'file')} {classes}",
                "decide which is right and delete the other copies; whatever a model answers, it is wrong once",
                conflicts,
            )
        )
    if leaks:
        title = f"{counted(len(leaks), 'file')} in more than one part: the same bytes in {_parts(leaks)}"
        findings.append(Finding("leak", "error", title, _leak_remedy(drawn), leaks))
    if rest:
        spare = counted(sum(len(together) - 1 for together in rest), "image")
        findings.append(
            Finding(
                "duplicates",
                "warning",
                f"{counted(len(rest), 'file')} more than once in one {one_class}part ({spare} to spare)",
                "delete the copies; they only make some pictures count more than others",
                rest,
            )
        )
    return findings


def _alike_findings(pictures: Sequence[DatasetImage], sets: Sets, drawn: bool) -> list[Finding]:
    return [
        Finding(
            "alike",
            "warning",
            f"{sum(map(len, sets)):,} of {len(pictures):,} images look nearly the same as another one",
            "nothing is wrong where a standing camera took them one by one; where they are frames of films, or were "
            "multiplied by augmentation, name their source as the group (a column of --csv): it then stays in one part",
            _shown(pictures, sets, _part),
        )
    ]


def _near_findings(pictures: Sequence[DatasetImage], sets: Sets, drawn: bool) -> list[Finding]:
    conflicts, leaks, rest = _sorted_out(pictures, sets)
    findings, (classes, one_class) = [], _words(conflicts + rest)
    if leaks:
        title = f"{counted(len(leaks), 'picture')} with near copies in more than one part: {_parts(leaks)}"
        findings.append(Finding("near_leak", "error", title, _leak_remedy(drawn), leaks))
    if conflicts:
        findings.append(
            Finding(
                "near_conflict",
                "warning",
                f"{counted(len(conflicts), 'picture')} with near copies {classes.replace('more than one', 'another')}",
                "look at them: either a label is wrong, or the difference that counts is very small (then train "
                "with a larger --image-size)",
                conflicts,
            )
        )
    if rest:
        spare = counted(sum(len(together) - 1 for together in rest), "image")
        findings.append(
            Finding(
                "near_duplicates",
                "note",
                f"{counted(len(rest), 'picture')} with near copies in the same {one_class}part ({spare} to spare)",
                "keep them if they were taken apart; delete those that were only resized or compressed again",
                rest,
            )
        )
    return findings


def _leak_remedy(drawn: bool) -> str:
    if drawn:
        return (
            "delete the copies, or give them one group (a column of --csv), before the parts are drawn; until then "
            "the model is measured on pictures it was trained on"
        )
    return "delete the copies from val and test; until then the model is measured on pictures it was trained on"


def _sorted_out(pictures: Sequence[DatasetImage], sets: Sets) -> tuple[tuple[tuple[DatasetImage, ...], ...], ...]:
    """Return the sets with several classes, those across parts (they may be both), and all others."""

    def several(fact: Callable[[DatasetImage], str], together: list[int]) -> bool:
        return len({fact(pictures[i]) for i in together}) > 1

    wrong = [bool(contradicting([pictures[i] for i in together])) for together in sets]
    conflicts = [together for together, found in zip(sets, wrong, strict=True) if found]
    leaks = [together for together in sets if several(_part, together)]
    rest = [t for t, found in zip(sets, wrong, strict=True) if not found and not several(_part, t)]
    return _shown(pictures, conflicts, _label), _shown(pictures, leaks, _part), _shown(pictures, rest, _part)


def contradicting(together: Sequence[DatasetImage]) -> list[str]:
    """Return the tasks in which copies of one picture have labels that exclude each other; "class" of a single one.

    A label that is not known contradicts none, and numbers do so from a tenth of their standard deviation on.
    """
    labels = [picture.example.label for picture in together]
    known = [one for one in labels if isinstance(one, TaskLabels)]
    if not known:
        return ["class"] if len({picture.label for picture in together}) > 1 else []
    found = []
    for number, task in enumerate(known[0].tasks):
        values = [value for one in known if (value := one.values[number]) is not None]
        numbers = [value for value in values if isinstance(value, float)]
        apart = max(numbers) - min(numbers) > CONTRADICTS * task.std if numbers else len(set(values)) > 1
        found += [task.name] if apart else []
    return found


def _words(sets: Sequence[Sequence[DatasetImage]]) -> tuple[str, str]:
    """Return how to say that copies contradict each other, and what else than a part copies may be in."""
    if not any(isinstance(picture.example.label, TaskLabels) for together in sets for picture in together):
        return "under more than one class", "class and "
    counts = Counter(name for together in sets for name in contradicting(together))
    return f"with labels that contradict each other: {', '.join(f'{n} ({c})' for n, c in counts.items())}", ""


def _label(picture: DatasetImage) -> str:
    return picture.label


def _part(picture: DatasetImage) -> str:
    return picture.part


def _shown(
    pictures: Sequence[DatasetImage], sets: Sets, fact: Callable[[DatasetImage], str]
) -> tuple[tuple[DatasetImage, ...], ...]:
    return tuple(varied([pictures[i] for i in together], fact) for together in sets)


def _parts(sets: Sequence[Sequence[DatasetImage]]) -> str:
    """Say between which parts the sets run, and how many between each."""
    counts: dict[str, int] = defaultdict(int)
    for together in sets:
        counts[" and ".join(dict.fromkeys(member.part for member in together))] += 1
    return ", ".join(f"{parts} ({count:,})" for parts, count in counts.items())
