"""Find the sites of a model in the family table."""

from collections.abc import Mapping

from torch import nn

from visgraft.core.families import BLOCKS, SitesOf, outside_sites
from visgraft.core.method import Grid
from visgraft.core.sites import Site, Sites
from visgraft.errors import SiteError


def find_sites(model: nn.Module) -> Sites:
    """Return the sites of a backbone; blocks are numbered in the order in which they stand.

    Raises:
        SiteError: the model has no block of a known class, or mixes one with blocks of an unknown class.
    """
    grid = token_grid(model)
    found: list[dict[str, Site]] = []
    stages: list[int] = []
    unknown: list[type[nn.Module]] = []
    for path, stack in model.named_modules():
        if not isinstance(stack, nn.Sequential | nn.ModuleList):
            continue
        members = list(stack.named_children())
        if not any(type(member) in BLOCKS for _, member in members):
            unknown += [type(member) for _, member in members if len(list(member.children())) > 1]
            continue
        stage = stages[-1] + 1 if stages else 0
        for name, member in members:
            if type(member) not in BLOCKS:
                raise SiteError(_refusal(model, [type(member)], BLOCKS))
            sites = BLOCKS[type(member)](member, f"{path}.{name}", len(found), grid)
            found.append({site.name: site for site in sites})
            stages.append(stage)
    if not found:
        raise SiteError(_refusal(model, unknown, BLOCKS))
    return Sites(tuple(found), tuple(stages), {site.name: site for site in outside_sites(model, grid)})


def _refusal(model: nn.Module, unknown: list[type[nn.Module]], table: Mapping[type[nn.Module], SitesOf]) -> str:
    names = ", ".join(dict.fromkeys(cls.__name__ for cls in unknown)) or "none that visgraft recognises"
    known = ", ".join(f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for cls in table)
    return (
        f"{type(model).__name__} has blocks of class {names}, for which no sites are known (known: {known}); "
        "use a backbone of a known class, or a method that needs no site (linear, full, bitfit, norm)"
    )


def token_grid(model: nn.Module) -> Grid:
    """Return how the tokens lie behind the patch embedding; of 1 × 1 where the model has none (convolutional ones)."""
    embedding = getattr(model, "patch_embed", None) or getattr(model, "stem", None)
    height, width = getattr(embedding, "grid_size", None) or (1, 1)
    return Grid(height, width, getattr(model, "num_prefix_tokens", 0))
