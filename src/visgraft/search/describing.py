"""What can be said of methods and models without any data."""

from typing import Any

import torch

from visgraft.backbones.creation import Backbone, create_backbone
from visgraft.core.attach import assemble, count_parameters
from visgraft.core.placing import find_positions
from visgraft.errors import SiteError
from visgraft.export.merge import why_not_merged
from visgraft.methods import list_methods


def describe_methods(backbone: str, num_classes: int = 0) -> list[dict[str, Any]]:
    """Return name, paper, places, mergeability and trained parameters of every method on a backbone's meta copy."""
    with torch.device("meta"):
        create_backbone(Backbone(backbone, "none"))
    rows = []
    for name, method in list_methods().items():
        config = method.Config()
        with torch.device("meta"):
            model = create_backbone(Backbone(backbone, "none"), num_classes or 1)
        row: dict[str, Any] = {"name": name, "paper": method.paper}
        try:
            positions, _ = find_positions(model, config)
            places = dict.fromkeys(position.place for position in positions)
            row["places"] = [p.reads if p.reads == p.adds_to else f"{p.reads} -> {p.adds_to}" for p in places]
            row["why_not_merged"] = why_not_merged(model, config)
            row["mergeable"] = row["why_not_merged"] is None
            row["params_adapter"] = count_parameters(assemble(model, config)).adapter
        except SiteError as error:
            row |= {"places": None, "mergeable": None, "why_not_merged": None, "params_adapter": None}
            row["refused"] = str(error)
        rows.append(row)
    return rows
