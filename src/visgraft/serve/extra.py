"""Whether what a server needs is installed."""

from importlib.util import find_spec

from visgraft.errors import VisgraftError

NEEDED = ("fastapi", "uvicorn", "multipart", "prometheus_client", "swagger_ui_bundle")


def check_installed() -> None:
    """Raise a VisgraftError that says what to install, where something is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise VisgraftError(f"serving needs {missing[0]}, which is not installed; run pip install 'visgraft[serve]'")
