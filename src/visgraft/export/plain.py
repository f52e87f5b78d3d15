"""A merged model as a folder in timm's own format: written, opened, and made of an adapter directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from visgraft.adapters.directory import load, read_record
from visgraft.adapters.hub import settled
from visgraft.backbones.creation import origin_of
from visgraft.backbones.input_size import built_size
from visgraft.data.images import Loading
from visgraft.data.read import AnySource
from visgraft.data.tasks import LabelTask
from visgraft.errors import MergeError, VisgraftError
from visgraft.export.certificate import told_of
from visgraft.export.merge import merge
from visgraft.files import check_target, new_directory, write_json
from visgraft.measure.measuring import adapter_data, load_as_trained

CERTIFICATE_IMAGES = 64
_DEFAULT_LOADING = Loading()


def save_plain(
    model: nn.Module,
    path: str | Path,
    classes: Sequence[str],
    data_config: Mapping[str, Any],
    certificate: Any,
    tasks: Sequence[LabelTask] = (),
) -> Path:
    """Write a merged plain model in timm's own format; `create_model("local-dir:PATH", pretrained=True)` opens it."""
    with new_directory(Path(path), "config.json") as folder:
        write_plain(model, folder, classes, data_config, tasks)
        write_json(folder / "certificate.json", told_of(certificate))
    return Path(path)


def write_plain(
    model: nn.Module,
    folder: Path,
    classes: Sequence[str],
    data_config: Mapping[str, Any],
    tasks: Sequence[LabelTask] = (),
) -> None:
    """Fill a folder with a plain model in timm's own format.

    Raises:
        MergeError: timm did not create the model by a name, so that it could not open it either.
    """
    own: Any = getattr(model, "pretrained_cfg", None) or {}
    if not own.get("architecture"):
        raise MergeError(
            f"timm opens folders by the name of a model, and this {type(model).__name__} has none; create it by "
            "timm.create_model, or export it to another format"
        )
    facts = {
        # What timm goes by when it loads the file; the other facts are of where the weights came from.
        **{key: own[key] for key in ("classifier", "first_conv", "fixed_input_size") if key in own},
        **{key: tuple(value) if isinstance(value, list) else value for key, value in data_config.items()},
    }
    # timm keeps a constructor's arguments only since 1.0.31.
    size, origin = built_size(model), origin_of(model)
    arguments = {**(origin.arguments if origin else {}), **({"img_size": list(size)} if size else {})}
    config: dict[str, Any] = {"pretrained_cfg": facts, "model_args": arguments}
    if classes:
        config["label_names"] = list(classes)
    if tasks:  # which timm passes over
        config["tasks"] = [task.to_json() for task in tasks]
    timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True)


def reopen_plain(path: Path) -> nn.Module:
    """Open a merged model with timm alone."""
    try:
        return timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    except (OSError, RuntimeError, AssertionError) as error:
        raise VisgraftError(f"{path} is not a model folder that timm can open ({error})") from error


@settled()
def merge_adapter(
    adapter: Path,
    out: Path,
    *,
    data: AnySource | None = None,
    weights: str | None = None,
    loading: Loading = _DEFAULT_LOADING,
) -> dict[str, Any]:
    """Fold an adapter into its backbone, measure, and write a plain timm model with its certificate.

    Raises:
        MergeError: it cannot be folded exactly, or the measured difference is above the tolerance.
    """
    check_target(out, "config.json")
    record = read_record(adapter)
    images = None
    if data is not None:
        dataset, _ = adapter_data(adapter, data)
        examples = (dataset.val or dataset.train or dataset.test)[:CERTIFICATE_IMAGES]
        images = load_as_trained(examples, record, len(dataset.classes), loading).batches()
    adapted = load(adapter, weights=weights)
    plain, certificate = merge(adapted.model, images, tasks=record.tasks)
    save_plain(plain, out, adapted.classes, record.data_config, certificate, record.tasks)
    reopen = f"timm.create_model({f'local-dir:{out}'!r}, pretrained=True)"
    return {"out": str(out), "method": record.method.method, **told_of(certificate), "open_with": reopen}
