"""The best smaller adapter of a linear one: every map cut to a rank by its singular values, and what that costs."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visgraft.adapters.directory import adapter_tensors, load, save
from visgraft.adapters.hub import settled
from visgraft.adapters.record import AdapterRecord
from visgraft.algebra.agreement import Agreement, find_agreement, load_pictures
from visgraft.algebra.changes import position_map, why_not_linear
from visgraft.core.attach import assemble, count_parameters, detach
from visgraft.core.attached import Attached, get_attached
from visgraft.core.method import HoldsLowRank, Position
from visgraft.core.placing import find_positions
from visgraft.core.tensors import CHILD
from visgraft.errors import AdapterError, SiteError
from visgraft.export.peft_change import low_rank_factors
from visgraft.files import check_writable
from visgraft.measure.evaluation import logits_of
from visgraft.measure.precision import make_compute
from visgraft.methods import list_methods
from visgraft.options import MethodConfig


class MapFactors(NamedTuple):
    """A map x ↦ A x + a of a token, float64: A = `left` [D, r] · diag(`values` [r]) · `right` [r, R], `shift` a [D].

    The values fall, and are above what rounding in float32 leaves of a map.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    shift: Tensor

    @property
    def rank(self) -> int:
        """The map's numerical rank."""
        return len(self.values)

    def energy(self, rank: int) -> tuple[float, float]:
        """Return the squares of the `rank` largest singular values, added up, and those of all."""
        squares = self.values.square()
        return squares[:rank].sum().item(), squares.sum().item()


@dataclass(frozen=True)
class Truncation:
    """What a smaller adapter costs.

    `rank` is that of its maps, `rank_before` the largest of the adapter's that it was made of. `energy` is the part of
    the squared Frobenius norm of all maps that is kept, `energy_by_block` that of each block's, by its number.
    `parameters` and `parameters_before` are those that train, without the head. `agreement` is None where there were no
    images.
    """

    out: str
    method: str
    rank: int
    rank_before: int
    energy: float
    energy_by_block: Mapping[int, float]
    parameters: int
    parameters_before: int
    agreement: Agreement | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


@settled()
def truncate_adapter(
    adapter: str | Path,
    rank: int,
    out: str | Path,
    *,
    images: Sequence[str | Path] | None = None,
    weights: str | None = None,
) -> Truncation:
    """Write the adapter of a smaller rank whose maps are nearest to those of a linear adapter, in the Frobenius norm.

    It is of a method that can be any map of that rank at the same places; the head and what else trains stay.

    Args:
        adapter: an adapter's directory, or `hf:USER/NAME`.
        rank: of each map.
        out: the directory to write, which must not be there.
        images: paths of pictures on which both answer.
        weights: where the backbone's weights come from, in place of what the adapter says.

    Raises:
        AdapterError: the adapter is damaged, not linear, not above this rank, or stands where no method has such maps;
            or `out` exists.
        DataError: a file is no image.
    """
    adapter, out = Path(adapter), Path(out)
    check_new(rank, out)
    adapted = load(adapter, weights=weights)
    model, record = adapted.model, adapted.record
    held = _held(model, adapter, rank)
    maps = _factored(get_attached(model), held)
    most = max(one.rank for one in maps.values())
    _check_rank(adapter, rank, most)
    loaded, compute = None if images is None else load_pictures(images, record), make_compute("fp32")
    answers = None if loaded is None else logits_of(model, loaded, compute)
    before = count_parameters(model).adapter
    _replace(model, record, held.config, maps, rank)
    after = count_parameters(model).adapter
    if rank == most and after >= before:
        raise _no_smaller(adapter, rank, most)
    energy = _energy(maps.values(), rank)
    told = {"adapter": adapter.absolute().name, "rank": rank, "rank_before": most, "energy": energy}
    kept = {name: record.facts[name] for name in ("precision", "data") if name in record.facts}
    save(model, out, classes=adapted.classes, data_config=record.data_config, record={**kept, "truncation": told})
    agreement = None
    if loaded is not None and answers is not None:
        agreement = find_agreement((answers, logits_of(model, loaded, compute)), (record, record))
    energies = {name: _energy(of_block, rank) for name, of_block in _by_block(maps).items()}
    return Truncation(str(out), held.config.method, rank, most, energy, energies, after, before, agreement)


def check_new(rank: int, out: Path) -> None:
    """Raise an AdapterError unless there can be an adapter of this rank, written where nothing is yet."""
    if rank < 1:
        raise AdapterError(f"--to is {rank}, but a rank is at least 1")
    if out.exists() or out.is_symlink():
        raise AdapterError(f"{out} exists already; give --out the name of a new folder")
    check_writable(out)


class _Held(NamedTuple):
    """Options with which maps of a rank stand in place of others: each position's source, and which rows of its map."""

    config: MethodConfig
    sources: Mapping[Position, tuple[str, slice]]


def _held(model: nn.Module, path: Path, rank: int) -> _Held:
    """Return the first method's options that can be the attached one's maps, cut to a rank.

    Raises:
        AdapterError: the method is not linear, has no maps, or no method has some of this rank at its places.
    """
    attached = get_attached(model)
    config = attached.config
    if reason := why_not_linear(attached):
        raise AdapterError(
            f"{path}: {config.method} {reason}, so it has no maps to cut; give an adapter of a linear method"
        )
    if not attached.where:
        raise AdapterError(
            f"{path}: {config.method} adds no maps, so there is no rank to lower; give a low-rank adapter"
        )
    places = tuple(dict.fromkeys(position.place for position in attached.where.values()))
    for method in list_methods().values():
        if not issubclass(method, HoldsLowRank):
            continue
        found = method.holding(places, rank, config.shifts)
        if found is None:
            continue
        found = dataclasses.replace(found, last_blocks=config.last_blocks, also_train=config.also_train)
        sources = _sources(model, attached, found)
        if sources:
            return _Held(found, sources)
    where = ", ".join(dict.fromkeys(place.adds_to for place in places))
    raise AdapterError(
        f"{path}: no method holds maps of a rank where {config.method} has its own (at {where}); give an adapter that "
        "stands beside projections or before them"
    )


def _sources(model: nn.Module, attached: Attached, config: MethodConfig) -> dict[Position, tuple[str, slice]]:
    """Return where the map of each of the new positions comes from; nothing unless all of all maps is held."""
    try:
        positions, sites = find_positions(model, config)
    except SiteError:
        return {}
    found: dict[Position, tuple[str, slice]] = {}
    rows_held = dict.fromkeys(attached.where, 0)
    for position in positions:
        reads, adds_to = sites.at(position)
        for key, source in attached.where.items():
            from_, onto = attached.sites.at(source)
            start, stop = onto.rows or (0, onto.width)
            first, last = adds_to.rows or (0, adds_to.width)
            alike = (from_, onto.host, onto.side) == (reads, adds_to.host, adds_to.side)
            if alike and start <= first and last <= stop:
                found[position] = key, slice(first - start, last - start)
                rows_held[key] += last - first
    whole = all(rows == attached.where[key].adds_width for key, rows in rows_held.items())
    return found if whole and len(found) == len(positions) else {}


def _factored(attached: Attached, held: _Held) -> dict[Position, MapFactors]:
    """Return the maps that are to be cut, each whole, as factors in float64."""
    found = {}
    for position, (key, rows) in held.sources.items():
        affine = position_map(attached, key)
        matrix = (torch.diag(affine.matrix) if affine.matrix.ndim == 1 else affine.matrix)[rows]
        # What the map is made of was stored in float32; a singular value below its rounding is none.
        noise = torch.finfo(torch.float32).eps * matrix.norm().item()
        found[position] = MapFactors(*low_rank_factors(matrix, noise), affine.shift[rows])
    return found


def _check_rank(path: Path, rank: int, most: int) -> None:
    if not most:
        raise AdapterError(f"{path} adds nothing: all its maps are zero; train it first")
    if rank > most:
        raise _no_smaller(path, rank, most)


def _no_smaller(path: Path, rank: int, most: int) -> AdapterError:
    remedy = f"give --to {most - 1} or less" if most > 1 else "there is none of a smaller rank"
    return AdapterError(f"the maps of {path} are of rank {most} at most, so --to {rank} makes it no smaller; {remedy}")


def _replace(
    model: nn.Module, record: AdapterRecord, config: MethodConfig, maps: Mapping[Position, MapFactors], rank: int
) -> None:
    """Put the cut maps on a model in place of what is attached; the head and what else trains stay as they are."""
    own = {name: t for name, t in adapter_tensors(model).items() if not name.startswith(f"{CHILD}.")}
    kept = {name: tensor.clone() for name, tensor in own.items()}  # `detach` sets back what they are views of
    detach(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of what a map of a smaller rank leaves of a module as it starts
        assemble(model, config).eval()
    attached = get_attached(model)
    attached.adopt(record.own)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in kept.items():
            state[name].copy_(tensor)
    for key, position in attached.where.items():
        module: Any = attached.positions[key]
        one = maps[position]
        root = one.values[:rank].sqrt()
        module.hold((one.right[:rank].T * root), root[:, None] * one.left[:, :rank].T, one.shift)


def _by_block(maps: Mapping[Position, MapFactors]) -> dict[int, list[MapFactors]]:
    found: dict[int, list[MapFactors]] = {}
    for position, one in maps.items():
        block = position.block if position.last is None else position.last
        if block is not None:
            found.setdefault(block, []).append(one)
    return found


def _energy(maps: Iterable[MapFactors], rank: int) -> float:
    """Return the part of the maps' squared Frobenius norm that a rank keeps; 1 where all are zero."""
    pairs = [one.energy(rank) for one in maps]
    whole = sum(all_of_it for _, all_of_it in pairs)
    return sum(kept for kept, _ in pairs) / whole if whole else 1.0
