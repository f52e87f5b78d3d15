"""The verbs of the command line; each is thin and calls a function of another room."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from visgraft.adapters.hub import settled
from visgraft.cli.arguments import (
    AdapterFolder,
    Background,
    Cache,
    Csv,
    Data,
    Json,
    Part,
    Quiet,
    TaskFolders,
    TypedLoading,
    Weights,
    source,
)
from visgraft.cli.bench import build as build_bench
from visgraft.cli.blend import blend
from visgraft.cli.bundles import with_bundles
from visgraft.cli.check import check
from visgraft.cli.compare import compare
from visgraft.cli.diff import diff
from visgraft.cli.export import export
from visgraft.cli.import_ import import_
from visgraft.cli.info import info
from visgraft.cli.launched import joined
from visgraft.cli.nearest import nearest
from visgraft.cli.predict import predict
from visgraft.cli.push import push
from visgraft.cli.rank import rank
from visgraft.cli.report import report
from visgraft.cli.serve import serve
from visgraft.cli.streams import prepare_streams
from visgraft.cli.text import visible
from visgraft.cli.train import train
from visgraft.errors import Interrupted, VisgraftError
from visgraft.executors.distributed import ProcessLost, is_launched, leave, words_at_the_end
from visgraft.files import as_given
from visgraft.version import __version__

ROAD = """\
visgraft adapts a frozen, pretrained vision backbone to your images. From a folder to a model in use:

  visgraft check photos                             what is wrong with the images? (photos/CLASS/*.jpg, or a .csv)
  visgraft compare photos                           which method suits them, within a time?
  visgraft train photos --out my-adapter            train; the adapter takes a few hundred KB
  visgraft eval my-adapter photos                   how good is it on images kept apart?
  visgraft report my-adapter --data photos --out report.html     where does it err, and why?
  visgraft predict my-adapter new-photos            name the classes of new images
  visgraft serve my-adapter                         the same over HTTP, with a page
  visgraft merge my-adapter --out my-model          fold it into one plain timm model
  visgraft export my-adapter --data photos --out my-model.onnx   write it for another runtime, proven on your images
  visgraft push my-adapter USER/NAME                publish it; hf:USER/NAME then stands for it everywhere

Nothing at hand? visgraft demo --quick takes a minute. All verbs: visgraft --help
"""

LINE_FEEDS = re.compile(r"\s*[\n\r]\s*")


@with_bundles
def eval_(
    adapter: AdapterFolder,
    *,
    data: Data = None,
    csv: Csv = None,
    task: TaskFolders = None,
    weights: Weights = None,
    split: Part = "test",
    reading: TypedLoading,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure an adapter on the test images of a folder, a table or a data set."""
    from visgraft.cli.show import emit, print_figures, warn
    from visgraft.data.dataset import listed
    from visgraft.measure.measuring import eval_adapter

    if split not in ("test", "val", "train", "all"):
        raise VisgraftError(f"--split is {split!r}, but must be test, val, train or all")
    images, loading = source(data, csv, task), reading.loading()
    figures = eval_adapter(adapter, images, weights=weights, part=split, loading=loading)
    if left_out := figures.get("tasks_left_out"):
        told = ", ".join(f"{name} ({why})" for name, why in left_out.items())
        warn(f"left out: {told}; the figures say nothing about {'it' if len(left_out) == 1 else 'them'}")
    if figures["classes_missing"]:
        names = listed(figures["classes_missing"])
        which = "" if split == "all" else f"{split} "
        warn(f"there are no {which}images of {names}; the figures say nothing about them")
    emit(figures, json, lambda: print_figures(figures))


def merge(
    adapter: AdapterFolder,
    out: Annotated[Path, typer.Option(help="folder for the plain timm model", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="folder, .csv file or hf:NAME to measure on; none: seeded noise")
    ] = None,
    weights: Weights = None,
    cache: Cache = "auto",
    background: Background = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Fold an adapter into its backbone and certify the plain timm model."""
    from visgraft.cli.show import emit, print_agreement, result_console
    from visgraft.data.images import Loading
    from visgraft.export.plain import merge_adapter

    loading = Loading(cache, background=background)
    result = merge_adapter(adapter, out, data=data, weights=weights, loading=loading)

    def text() -> None:
        tasks = result.get("tasks", {})
        result_console.print(
            f"{out}: largest logit difference {result['max_abs_difference']:.1e}, "
            f"{'lowest' if tasks else 'top-1'} agreement {result['top1_agreement']:.1%} on {result['images']} "
            f"{result['source']}"
        )
        print_agreement(tasks)
        result_console.print(f"{result['verdict']}\nopen it with {result['open_with']}")

    emit(result, json, text)


def methods(
    backbone: Annotated[str, typer.Option(help="timm model name")] = "vit_base_patch16_224",
    json: Json = False,
) -> None:
    """List the methods with their places, mergeability and parameters on a backbone (no weights are needed)."""
    from visgraft.cli.show import emit, print_table, result_console
    from visgraft.search.describing import describe_methods

    rows = describe_methods(backbone)
    yes = {True: "yes", False: "no", None: "–"}
    shown = [
        [
            row["name"],
            row["paper"],
            "refused" if "refused" in row else ", ".join(row["places"]) or "–",
            yes[row["mergeable"]],
            "–" if "refused" in row else f"{row['params_adapter']:,}",
        ]
        for row in rows
    ]
    columns = ["method", "source", "places per block", "merges", "parameters"]

    def text() -> None:
        print_table(f"on {backbone}, default options, head excluded", columns, shown)
        for row in rows:
            if row.get("refused") or row["why_not_merged"]:
                told = row.get("refused") or f"not merged: {row['name']} {row['why_not_merged']}"
                result_console.print(told)

    emit(rows, json, text)


def demo(
    out: Annotated[Path, typer.Option(help="folder for data, adapters and picture")] = Path("demo-out"),
    epochs: Annotated[int | None, typer.Option(help="epochs of sct and alore; none: the demo's", min=1)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="one adapter and a page on it, in a minute")] = False,
    full: Annotated[bool, typer.Option("--full", help="all of it, however long this machine takes")] = False,
    json: Json = False,
) -> None:
    """Draw gauges, train linear, sct and alore on a real pretrained ViT, merge, and paint a picture."""
    from visgraft.cli.demo import print_demo, print_quick, run_demo, run_quick
    from visgraft.cli.show import emit

    if quick and (full or epochs):
        raise VisgraftError("--quick does not go with --full or --epochs; leave one out")
    if quick:
        found = run_quick(out)
        emit(found, json, lambda: print_quick(found))
        return
    result = run_demo(out, epochs, full)
    emit(result, json, lambda: print_demo(result))


def _with_flags(verb: Callable[..., None], words: Sequence[str]) -> Callable[..., None]:
    """Return `train` or `export` with its generated options, or, where the words are of another verb, its name."""
    if verb.__name__ in words:
        from visgraft.cli.options import format_flags, train_flags, with_flags

        return with_flags(verb, train_flags if verb is train else format_flags)

    def name_only() -> None: ...

    name_only.__doc__ = verb.__doc__
    return name_only


def _road(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False,
) -> None:
    """Adapt a frozen, pretrained vision backbone with well under 1 % extra parameters."""
    if version:
        typer.echo(f"visgraft {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(ROAD)


def build(words: Sequence[str]) -> typer.Typer:
    """Return the app for a command of these words; the options of `train` are generated from the registered methods."""
    app = typer.Typer(name="visgraft", add_completion=True, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_road)
    verbs: dict[str, Callable[..., None]] = {"check": check, "compare": compare, "train": _with_flags(train, words)}
    verbs |= {
        "eval": eval_,
        "report": report,
        "predict": predict,
        "serve": serve,
        "merge": merge,
        "export": _with_flags(export, words),
    }
    verbs |= {"nearest": nearest, "diff": diff, "rank": rank}
    verbs |= {"blend": blend, "import": import_, "info": info, "push": push, "methods": methods}
    for name, verb in (verbs | {"demo": demo}).items():
        app.command(name)(verb)
    app.add_typer(build_bench(), name="bench")
    return app


def main() -> None:
    """Run the command line; errors made on purpose, and wrong usage, are one line on standard error."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit keeps what Ctrl-C keeps
    prepare_streams()
    completing = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS") or ""
    try:
        with settled(), joined(sys.argv[1:]):
            code = build([*sys.argv[1:], *completing.split()])(standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C outside a training
            _fail("interrupted", 130, True)
        leave()
        sys.stdout.flush()  # a full disk shows here at the latest
        _end(code if isinstance(code, int) else 0)
    except BrokenPipeError:  # whoever reads has read enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = "what was asked for" if error.filename is None else os.fsdecode(error.filename)
        _fail(f"{where} cannot be read or written ({error.strerror or error}); give another path or make room", 1)
    except Interrupted as error:
        _fail(str(error), 130, True)
    except VisgraftError as error:
        _fail(str(error), 1, isinstance(error, ProcessLost))
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130, True)
    except Exception as error:
        # Wrong usage is click's UsageError; typer has moved that class, so it is known by what it offers.
        if not hasattr(error, "format_message"):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "visgraft")
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)


def _fail(message: str, code: int, by_others: bool = False) -> NoReturn:
    """End with one line, which one of several processes prints; `by_others`: another's error may be the cause."""
    told = words_at_the_end(message, by_others)
    if told is not None:
        print(f"error: {visible(LINE_FEEDS.sub(' ', as_given(told)))}", file=sys.stderr)
    _end(code)


def _end(code: int) -> NoReturn:
    """End the process; one of several at once.

    Python's own end would wait for what is still under way to processes that are gone, and now and then aborts
    ("terminate called without an active exception") where a thread of torch's group wants the interpreter meanwhile.
    """
    if is_launched():
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
