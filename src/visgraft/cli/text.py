"""Text of the user, as a terminal can be given it: names of files and classes are shown, never obeyed."""

import json
import os
import re
import shlex
from typing import Any

# Control characters, and those that turn the direction of all that follows; a line feed stays one.
_UNSEEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[{_UNSEEN}]")
_NOT_IN_QUOTES = re.compile(f"[{_UNSEEN}\n\t\ud800-\udfff]")


def visible(text: str) -> str:
    """Return text in which characters that act on a terminal are written as escapes, such as \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def json_text(value: object) -> str:
    """Return plain values as JSON on one line, in which nothing acts on a terminal."""
    text = json.dumps(value, ensure_ascii=False)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def command_line(*words: object) -> str:
    """Return a command as it can be pasted into bash or zsh, whatever its words hold."""
    return " ".join(_quoted(str(word)) for word in words)


def path_argument(path: object) -> str:
    """Return a path as an argument that cannot be taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _quoted(word: str) -> str:
    if not _NOT_IN_QUOTES.search(word):
        return shlex.quote(word)

    def escape(found: re.Match[str]) -> str:
        return "".join(f"\\x{byte:02x}" for byte in os.fsencode(found[0]))

    escaped = _NOT_IN_QUOTES.sub(escape, word.replace("\\", "\\\\").replace("'", "\\'"))
    return f"$'{escaped}'"


def styled(*parts: str | tuple[str, str]) -> Any:
    """Return a `rich` text of plain and of (text, style) parts."""
    from rich.text import Text

    return Text.assemble(*(visible(part) if isinstance(part, str) else (visible(part[0]), part[1]) for part in parts))
