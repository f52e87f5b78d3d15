"""What the terminal is shown of this program and of the libraries it uses."""

import io
import logging
import os
import sys
import warnings

from visgraft.errors import VisgraftWarning


class _Told(logging.Handler):
    """Prints what the library logs, such as which tensors of a weights file it took, once each."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record on standard error, unless it was printed before."""
        from visgraft.cli.show import progress_console

        text = record.getMessage()
        if text not in self.told:
            self.told.add(text)
            progress_console.print(text)


def _show_warning(
    message: Warning | str, category: object, filename: str, lineno: int, file: object = None, line: str | None = None
) -> None:
    from visgraft.cli.show import warn

    warn(str(message))


def prepare_streams() -> None:
    """Let any name be printed and our own log be shown, and keep back what other libraries tell programmers.

    Their warnings are not for users: what these can act on is said by ourselves. Those who want them all the same ask
    Python for them, with -W or PYTHONWARNINGS.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # nor those that are read
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=VisgraftWarning)
        warnings.showwarning = _show_warning
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # in the processes of a benchmark too
    if logging.lastResort:
        logging.lastResort.setLevel(logging.ERROR)
    logging.getLogger("visgraft").setLevel(logging.INFO)
    logging.getLogger("visgraft").handlers = [_Told()]
