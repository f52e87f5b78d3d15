"""The names of a head's outputs, as a user gives them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from typing import Any

from visgraft.errors import AdapterError


def class_names(classes: Iterable[str], outputs: int) -> list[str]:
    """Return the names of classes as plain text, in order; empty where none is named.

    Args:
        classes: a list, a tuple, a NumPy array, or anything else that yields names in the order of the head's outputs.
        outputs: how many outputs the head has.

    Raises:
        AdapterError: they are no names, have no order, are not all different, or are not as many as the outputs.
    """
    given: Any = classes
    if isinstance(given, str | bytes | Mapping | Set):
        kind = "one text" if isinstance(given, str | bytes) else f"a {type(given).__name__}"
        raise AdapterError(f"classes is {kind}; pass a list of names in the order of the head's outputs")
    try:
        found = list(given)
    except TypeError as error:
        raise AdapterError(f"classes is {type(given).__name__}, no list; pass a list of names") from error
    for number, name in enumerate(found):
        if not isinstance(name, str):
            raise AdapterError(
                f"the name of class {number} is of type {type(name).__name__}; pass names as text, "
                "e.g. [str(name) for name in classes]"
            )
    names = [str(name) for name in found]  # NumPy's text is not quite Python's
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise AdapterError(f"several classes are called {', '.join(twice[:5])}; give each class a name of its own")
    if names and outputs != len(names):
        raise AdapterError(f"{len(names)} class names for a head of {outputs} outputs; pass one for each")
    return names
