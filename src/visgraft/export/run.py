"""From an adapter to a file in another format: written aside, proven by its own runtime, and only then put in place."""

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from visgraft.adapters.directory import Adapted, load, read_record
from visgraft.adapters.hub import settled
from visgraft.backbones.creation import create_backbone
from visgraft.backbones.wrappers import unwrapped
from visgraft.core.attach import assemble
from visgraft.core.tensors import eval_mode
from visgraft.data.images import Loading
from visgraft.data.read import AnySource
from visgraft.errors import VisgraftError
from visgraft.export.certificate import told_of
from visgraft.export.format import ExportError, Format, Subject, find_format, missing_packages
from visgraft.export.formats import FORMATS
from visgraft.export.proof import ExportCertificate, measure
from visgraft.export.samples import Samples, drawn_samples, read_samples
from visgraft.files import check_target, check_writable, new_directory, one_at_a_time, write_json
from visgraft.option_types import convert, types_of
from visgraft.options import Options, flag_of

CERTIFICATE = "certificate.json"
_DEFAULT_LOADING = Loading()


@settled()
def list_formats(adapter: Path) -> list[dict[str, Any]]:
    """Return name, summary and what is missing or speaks against each format for this adapter, without its weights.

    Raises:
        AdapterError: the adapter is damaged.
    """
    record = read_record(adapter)
    with torch.device("meta"):
        model = create_backbone(dataclasses.replace(record.backbone, weights="none"), record.outputs)
    adapted = Adapted(assemble(model, record.method).eval(), record)
    rows = []
    for name, form in FORMATS.items():
        lacking = missing_packages(form)
        reason = form.refusal(adapted, form.Options())
        rows.append(
            {
                "format": name,
                "summary": form.summary,
                "options": list(types_of(form.Options)),
                "possible": reason is None,
                "why_not": None if reason is None else f"{record.method.method} {reason}",
                "install": f"pip install 'visgraft[{form.extra}]'" if lacking else None,
            }
        )
    return rows


def make_options(form: type[Format], values: Mapping[str, Any]) -> Options:
    """Return a format's options from texts as typed, or from values; None stands for what was not given.

    Raises:
        ExportError: the format has no such option.
        VisgraftError: a value is not of its option's type.
    """
    hints = types_of(form.Options)
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        if name not in hints:
            takers = [each for each, other in FORMATS.items() if name in types_of(other.Options)]
            who = f"{', '.join(takers)} would take it" if takers else "no format takes it"
            raise ExportError(f"{flag_of(name)} has no effect on the format {form.name}; leave it out ({who})")
        if why := form.cannot.get(name, {}).get(str(value)):
            raise ExportError(f"{flag_of(name)} {value} cannot be written as {form.name}: {why}")
    return form.Options(**{n: convert(v, hints[n], flag_of(n), typed=isinstance(v, str)) for n, v in given.items()})


@settled()
def export_adapter(
    adapter: str | Path,
    out: str | Path,
    format: str = "onnx",
    *,
    data: AnySource | None = None,
    weights: str | None = None,
    loading: Loading = _DEFAULT_LOADING,
    **options: Any,
) -> dict[str, Any]:
    """Write an adapter with its backbone in another format, and prove that the file answers as the model.

    Args:
        adapter: the adapter's directory.
        out: the file or folder to write, as the format has it; an earlier export there is replaced.
        format: a name of `list_formats`.
        data: the pictures to prove it on, up to 200, validation images where there are any; None: drawn pictures.
        weights: where the backbone's weights come from, in place of what the adapter says.
        loading: how those pictures are read.
        options: of the format, by name.

    Returns:
        the certificate's fields, `out`, `seconds` and `open_with`.

    Raises:
        ExportError: no such format or option, a package is missing, the format cannot say this adapter, or the file
            written answers otherwise; nothing is left behind then.
        AdapterError, DataError, WeightsError: the adapter, the pictures or the weights cannot be used.
    """
    begin, adapter, out = time.perf_counter(), Path(adapter), Path(out)
    form = find_format(format, FORMATS)
    chosen = make_options(form, options)
    _check_packages(form)
    _check_out(out, form)
    _check_apart(out, adapter, data, weights)
    record = read_record(adapter)
    form.check_data(chosen, data is not None)
    calibration: Callable[[], Samples] | None = None
    if data is None:
        samples = drawn_samples(record.data_config)
    else:
        samples = read_samples(adapter, record, data, loading)
        calibration = partial(read_samples, adapter, record, data, loading, parts=("train",))
    subject = Subject(load(adapter, weights=weights), str(adapter), samples, calibration)
    certificate = export_subject(subject, form, chosen, out)
    told = {"out": str(out), "seconds": time.perf_counter() - begin, "open_with": form.usage(out, chosen)}
    return {**told_of(certificate), **told}


def export_model(adapted: Adapted, out: str | Path, format: str = "onnx", **options: Any) -> ExportCertificate:
    """Write a model with something attached, as `load` or `Adapted.of` returns it, and prove it on drawn pictures.

    Raises:
        ExportError: as `export_adapter`.
    """
    if not isinstance(adapted, Adapted):
        raise ExportError(
            f"export_model takes what load or Adapted.of returns, but was given a {type(adapted).__name__}"
        )
    if adapted.own_transform is not None:
        raise ExportError(
            "the model prepares its pictures with a transform of its own, which no file holds; export "
            "dataclasses.replace(adapted, own_transform=None), and prepare pictures with yours before they go in"
        )
    form = find_format(format, FORMATS)
    chosen = make_options(form, options)
    _check_packages(form)
    _check_out(Path(out), form)
    form.check_data(chosen, False)
    samples = drawn_samples(adapted.record.data_config)
    adapted = dataclasses.replace(adapted, model=unwrapped(adapted.model))  # a compiled model would be compiled anew
    return export_subject(Subject(adapted, "the model", samples), form, chosen, Path(out))


def export_subject(subject: Subject, form: type[Format], chosen: Options, out: Path) -> ExportCertificate:
    """Write, prove, and put in place.

    Raises:
        ExportError: the format cannot say the adapter, or the file written answers otherwise.
    """
    if reason := form.refusal(subject.adapted, chosen):
        method = subject.adapted.record.method.method
        raise ExportError(f"{subject.name} cannot be exported as {form.name}: {method} {reason}")
    precision = next(subject.adapted.model.parameters()).dtype
    if precision != torch.float32:
        raise ExportError(
            f"{subject.name} is in {str(precision).removeprefix('torch.')}, but is proven in float32; call "
            "model.float() first"
        )
    with _writing(out, form) as target, eval_mode(subject.adapted.model):
        facts = form.write(subject, chosen, target)
        certificate = _prove(form, chosen, subject, target, facts)
        write_json(_certificate_of(target, form), told_of(certificate))
    return certificate


def _check_packages(form: type[Format]) -> None:
    if lacking := missing_packages(form):
        needs = f"{' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed"
        raise ExportError(f"the format {form.name} needs {needs}; run: pip install 'visgraft[{form.extra}]'")


def _prove(
    form: type[Format], options: Any, subject: Subject, target: Path, facts: Mapping[str, Any]
) -> ExportCertificate:
    """Return the certificate of what was written.

    Raises:
        ExportError: it does not open, or answers otherwise than the model.
    """
    record = subject.adapted.record
    answer = form.opened_onto(subject, target, options)
    measured = measure(
        subject, answer, form.least_agreement(options), form.prepares(options), form.images_each(options)
    )
    versions = {name: found for name in ("torch", "timm", *form.packages.values()) if (found := _version(name))}
    return ExportCertificate(
        format=form.name,
        options=options.to_dict(),
        method=record.method.method,
        backbone=record.backbone.name,
        merged=subject.why_not_merged is None,
        why_not_merged=subject.why_not_merged,
        computed_by=f"{form.runtime or 'torch'} {_version(form.runtime or 'torch')}",
        bytes=sum(file.stat().st_size for file in _files(target)),
        facts=dict(facts),
        versions=versions,
        **measured,
    )


def _files(target: Path) -> list[Path]:
    return [file for file in target.rglob("*") if file.is_file()] if target.is_dir() else [target]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _certificate_of(target: Path, form: type[Format]) -> Path:
    """Return where the certificate lies: in the folder, or beside the file."""
    return target.with_name(f"{target.name}.{CERTIFICATE}") if form.suffix else target / CERTIFICATE


def _check_out(out: Path, form: type[Format]) -> None:
    """Raise unless the file or folder can be written, and is free or an earlier export."""
    if not form.suffix:
        check_target(out, CERTIFICATE)
        return
    if out.suffix != form.suffix or out.is_dir():
        raise ExportError(f"--out is {out}, but the format {form.name} writes one file that ends in {form.suffix}")
    check_writable(out)
    check_writable(_certificate_of(out, form))  # whose name is longer
    if out.exists() and not _certificate_of(out, form).is_file():
        raise ExportError(
            f"{out} exists and is not an earlier export (its certificate is missing); choose another --out"
        )


def _check_apart(out: Path, *sources: object) -> None:
    """Raise where one of what is read lies in the folder `out`, which is replaced as a whole."""
    for source in sources:
        path = Path(source) if isinstance(source, str | Path) else None
        if path is not None and path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise ExportError(f"{path} lies in --out {out}, which would be replaced with it; choose another --out")


@contextmanager
def _writing(out: Path, form: type[Format]) -> Iterator[Path]:
    """Yield where a format may write; what is there becomes `out` on success, and vanishes on failure."""
    if not form.suffix:
        with new_directory(out, CERTIFICATE) as folder:
            yield folder
        return
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        target = temporary / out.name
        yield target
        made = (target, _certificate_of(target, form))
        for file in made:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        with one_at_a_time(out.parent):  # so that no certificate comes to lie beside another export's file
            _certificate_of(out, form).unlink(missing_ok=True)  # of an earlier file, which it must not outlive
            for file in made:
                os.replace(file, out.with_name(file.name))
    except OSError as error:
        raise VisgraftError(f"{out} cannot be written ({error.strerror or error}); choose another --out") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
