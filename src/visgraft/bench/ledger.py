"""Results on disk: one JSON line per finished trial, appended in one write, so that a killed sweep loses none."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from visgraft.bench.trial import Result
from visgraft.errors import VisgraftError


def append(file: Path, result: Result) -> None:
    """Append a result to a file of lines.

    The line goes out in one write in append mode, so that sweeps that share the file do not mix theirs. What a killed
    process left of a line is closed first, to be skipped when the file is read.

    Raises:
        VisgraftError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (b"\n" if torn else b"") + result.to_line().encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise VisgraftError(f"{file} cannot be written ({error.strerror}); choose another --out") from error


def read_file(file: Path) -> list[Result]:
    """Return the results in a file of lines; a line that a killed process left unfinished is skipped.

    Raises:
        VisgraftError: a whole line is not a result, or is not the result of its trial.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        try:
            values = json.loads(line)
        except ValueError:
            continue  # blank, or cut short: a trial without a line is simply run again
        try:
            found.append(Result.from_dict(values))
        except (VisgraftError, KeyError, TypeError) as error:
            raise VisgraftError(
                f"{file}, line {number} is no result of this version ({error}); move the line elsewhere"
            ) from error
    return found


def read_results(places: Iterable[Path]) -> list[Result]:
    """Return the results of files and folders (their *.jsonl), each trial once: the line that was written last.

    Raises:
        VisgraftError: there is none, or a line cannot be used.
    """
    files = [file for place in places for file in (sorted(place.rglob("*.jsonl")) if place.is_dir() else [place])]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise VisgraftError(f"{missing} does not exist; name the folder that `visgraft bench run --out` wrote")
    found = {result.trial.key: result for file in files for result in read_file(file)}
    if not found:
        named = ", ".join(map(str, places))
        raise VisgraftError(f"{named} holds no results (*.jsonl); run `visgraft bench run PROTOCOL --out FOLDER` first")
    return list(found.values())
