"""The verb `serve`: answer over HTTP, with any number of adapters on one backbone."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visgraft.cli.arguments import CpusPerWorker, GpusPerWorker, Weights
from visgraft.cli.bundles import with_bundles

if TYPE_CHECKING:
    from visgraft.executors.on_ray import OnRay

LOCAL = ("localhost", "127.0.0.1", "::1")

Adapters = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ADAPTER]...", help="adapter folders or hf:USER/NAME", show_default=False),
]
AdaptersBelow = Annotated[
    Path | None,
    typer.Option("--adapters", metavar="DIR", help="folder with any number of adapters", show_default=False),
]
Host = Annotated[str, typer.Option(help="address to listen on; another than this machine's own needs tokens")]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="file with a token on each line, of which every request must bear one", show_default=False),
]
OnServers = Annotated[
    str | None,
    typer.Option(help="where: processes, ray or ray://HOST:PORT; none: processes", show_default=False),
]
Threads = Annotated[
    int | None, typer.Option(help="of each process; none: its share of the cores", min=1, show_default=False)
]
StoreFolder = Annotated[
    Path | None,
    typer.Option(help="folder for uploaded adapters; none: they end with the server", show_default=False),
]
Capacity = Annotated[
    int | None,
    typer.Option(help="adapters held beside the backbone; none: all; others are parked", min=1, show_default=False),
]
Pinned = Annotated[list[str] | None, typer.Option(help="name of an adapter that is never parked", show_default=False)]


@dataclass(frozen=True)
class TypedLimits:
    """What is answered at once, and what is refused, as typed."""

    max_batch: Annotated[int, typer.Option(help="images in a forward at most", min=1)] = 32
    max_delay_ms: Annotated[
        float, typer.Option(help="how long an idle model waits for images that are being decoded", min=0, max=1000)
    ] = 5.0
    max_queue: Annotated[int, typer.Option(help="images under way at most; more are told to come again", min=1)] = 512
    max_images: Annotated[int, typer.Option(help="images in a request at most", min=1)] = 64
    max_body_mb: Annotated[float, typer.Option(help="megabytes of a request at most", min=0.001)] = 32.0
    max_megapixels: Annotated[float, typer.Option(help="of a picture, by its header", min=0.001)] = 50.0

    def options(self) -> dict[str, Any]:
        """Return them as the server takes them, in bytes and pixels."""
        alike = ("max_batch", "max_delay_ms", "max_queue", "max_images")
        sizes = {"max_body": int(self.max_body_mb * 2**20), "max_pixels": int(self.max_megapixels * 1_000_000)}
        return {name: getattr(self, name) for name in alike} | sizes


@with_bundles
def serve(
    adapters: Adapters = None,
    *,
    folder: AdaptersBelow = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; 0: one that is free", min=0, max=65535)] = 8000,
    weights: Weights = None,
    token_file: TokenFile = None,
    on: OnServers = None,
    workers: Annotated[int, typer.Option(help="processes, each with its own backbone", min=1)] = 1,
    cpus_per_worker: CpusPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    threads: Threads = None,
    store: StoreFolder = None,
    capacity: Capacity = None,
    pin: Pinned = None,
    limits: TypedLimits,
) -> None:
    """Serve adapters over HTTP: a page for people, routes for programs."""
    from visgraft.serve.extra import check_installed

    check_installed()
    from visgraft.serve.run import serve as run
    from visgraft.serve.sockets import listen

    named = name_adapters(adapters or [], folder, pin or [])
    tokens = read_tokens(token_file, host)
    options: dict[str, Any] = {"weights": weights, "capacity": capacity, "pinned": tuple(pin or ()), "tokens": tokens}
    options |= limits.options()
    options |= {"adapters": str(folder) if folder else None, "threads": threads}
    options |= {"hosts": (*LOCAL, host.lower()) if _is_local(host) else ()} | ({"store": str(store)} if store else {})
    cluster = _cluster(on, workers, cpus_per_worker, gpus_per_worker)
    if cluster is not None:
        _serve_on_ray(named, options, host, port, cluster)
        return
    options["threads"] = threads or _share(workers)
    with listen(host, port) as listening:
        _announce(len(named), host, listening.getsockname()[1])
        run(named, options, listening, workers)


def _cluster(on: str | None, workers: int, cpus: int | None, gpus: float | None) -> "OnRay | None":
    """Return the cluster to serve on, or None: processes of this machine."""
    from visgraft.errors import VisgraftError
    from visgraft.executors.choosing import choose_executor, is_ray

    if on == "here":
        raise VisgraftError("--on is 'here', but must be processes, ray or ray://HOST:PORT to serve")
    if is_ray(on):
        from visgraft.serve.on_ray import check_installed

        check_installed()
    place = "processes" if on is None else on
    found: Any = choose_executor(place, workers, cpus=cpus, gpus=gpus, fresh=False, each="worker")
    return found if is_ray(on) else None


def _serve_on_ray(named: dict[str, str], options: dict[str, Any], host: str, port: int, cluster: "OnRay") -> None:
    from visgraft.serve.on_ray import opened

    with opened(named, options, host, port, cluster) as server:
        _announce(len(named), host, server.port, "" if server.is_here else f" of {server.machine}")
        server.run(_is_local(host))


def _announce(adapters: int, host: str, port: int, where: str = "") -> None:
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{adapters} adapters at {address}{where}, as soon as they are loaded", flush=True)


def name_adapters(paths: list[str], folder: Path | None, pinned: list[str]) -> dict[str, str]:
    """Return the adapters by the name they are served under: that of their folder, or their path below `folder`.

    Raises:
        AdapterError: one is damaged, they are of different backbones, or there are none.
        VisgraftError: two have one name, or there is none of a pinned name.
    """
    from visgraft.bank.opening import check_same_backbone, find_adapters
    from visgraft.errors import AdapterError, VisgraftError, nearest
    from visgraft.files import HUB_PREFIX
    from visgraft.serve.hosting import check_name

    found = {name: str(path) for name, path in find_adapters(folder).items()} if folder else {}
    for path in paths:
        name = path.removeprefix(HUB_PREFIX) if path.startswith(HUB_PREFIX) else Path(path).absolute().name
        if name in found:
            raise VisgraftError(f"{found[name]} and {path} would both be called {name}; rename one of the folders")
        found[name] = path
    if not found:
        raise AdapterError("no adapter is given; name adapter folders, or pass --adapters DIR")
    for name in found:
        check_name(name)
    for name in pinned:
        if name not in found:
            raise VisgraftError(f"--pin {name}: there is no adapter of this name{nearest(name, found)}")
    check_same_backbone(list(found.values()), prepared_alike=False)
    return found


def read_tokens(file: Path | None, host: str) -> tuple[str, ...]:
    """Return the tokens, of which a server that others can reach needs at least one.

    Raises:
        VisgraftError: there is none where one is needed, or the file cannot be used.
    """
    from visgraft.errors import VisgraftError

    if file is None:
        if not _is_local(host):
            raise VisgraftError(f"--host {host} can be reached by others; pass --token-file FILE with a token in it")
        return ()
    try:
        found = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise VisgraftError(
            f"--token-file {file} cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    if not found or not all(token.isascii() and " " not in token for token in found):
        raise VisgraftError(f"--token-file {file} must hold a token on each line, of ASCII without spaces")
    return found


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _share(workers: int) -> int | None:
    import os

    return max(1, (os.cpu_count() or 1) // workers) if workers > 1 else None
