"""The application behind Ray Serve: workers on the machines of a cluster, each with a backbone of its own."""

import contextlib
import logging
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from visgraft.errors import VisgraftError
from visgraft.executors.on_ray import OnRay
from visgraft.serve.keeper import FIGURES_SECONDS, Keeper, KeptStore, Sent, answer_of
from visgraft.serve.metrics import labelled, log_to_stderr
from visgraft.serve.run import DRAIN_SECONDS
from visgraft.serve.settings import ServeConfig
from visgraft.serve.store import StoreError, digest_of

LOG = logging.getLogger(__name__)
NAME = "visgraft"
"""Of the application, of the keeper's actor and of its namespace."""

MOST_REQUESTS = 10_000
"""That Ray gives a worker at a time: more than there ever are, for the engine's queue is the limit."""
CHECK_SECONDS = 30.0
"""In which a worker must have answered its seeded picture, or counts as ill; Ray replaces what is ill three times."""
LOST_SECONDS = 60.0
"""After which a keeper that does not answer is not waited for."""
AGAIN = 3
"""So often Ray asks a keeper again that was lost before it answered; each question can be asked twice."""
ON_HEAD: dict[str, Any] = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}


def check_installed() -> None:
    """Raise a VisgraftError that says what to install, where Ray Serve is missing."""
    try:
        import_module("ray.serve")
    except ImportError as error:
        lacking = getattr(error, "name", None) or "ray"
        raise VisgraftError(
            f"serve --on ray needs Ray Serve, but {lacking} is not installed; run pip install 'visgraft[serve-cluster]'"
        ) from error


class RayServer:
    """Adapters that a cluster keeps, and the workers that answer with them."""

    def __init__(self, keeper: Any, config: ServeConfig, cluster: OnRay, host: str, place: tuple[str, int]) -> None:
        self.keeper, self.config, self.cluster, self.host = keeper, config, cluster, host
        self.machine, self.port = place

    @property
    def is_here(self) -> bool:
        """Whether the cluster's first machine, which listens, is this one."""
        import ray

        return bool(self.machine == ray.util.get_node_ip_address())

    def run(self, is_local: bool) -> None:
        """Answer until a signal ends it; then what is under way is answered first.

        Args:
            is_local: whether only the cluster's first machine listens; otherwise all do that have a worker.

        Raises:
            VisgraftError: no worker can begin, or the cluster is lost.
        """
        from ray import serve

        log_to_stderr()
        options = {"host": self.host, "port": self.port}
        try:
            serve.start(proxy_location="HeadOnly" if is_local else "EveryNode", http_options=options)
            with ThreadPoolExecutor(1) as pool, _signals() as told:
                application = deployment(self.config, self.cluster).bind()
                ready = pool.submit(serve.run, application, name=NAME, route_prefix="/")
                try:
                    self._watch(ready, told)
                finally:
                    LOG.info("ending, once what is under way is answered")
                    _end()
        except (RuntimeError, TimeoutError, ConnectionError) as error:  # as Ray Serve raises them
            raise VisgraftError(
                f"Ray Serve cannot answer on the cluster ({_last_line(error)}); see Ray's logs"
            ) from error

    def _watch(self, ready: "Future[Any]", told: threading.Event) -> None:
        """Return once told to end."""
        running, heard = False, time.monotonic()
        while not told.wait(2.0 if running else 0.5):
            try:
                failure = answer_of(self.keeper.failure.remote())
                heard = time.monotonic()
            except StoreError:  # it is started again where it was lost
                if time.monotonic() - heard > LOST_SECONDS:
                    raise
                continue
            if failure is not None and not running:
                raise VisgraftError(failure)
            if failure is not None:
                LOG.error("a worker cannot begin: %s", failure)
            if not running and ready.done():
                ready.result()
                running = True
                LOG.info("%d workers answer", self.cluster.most)


@contextlib.contextmanager
def opened(
    adapters: Mapping[str, str | Path], options: Mapping[str, Any], host: str, port: int, cluster: OnRay
) -> Iterator[RayServer]:
    """Yield a server whose adapters are with the cluster; it does not answer yet.

    Args:
        adapters: at least one, by name.
        options: of `ServeConfig`; `store` is a folder of the cluster's first machine.
        host: address on which that listens.
        port: its port; 0: one that is free.
        cluster: where, with how many workers, and what each has.

    Raises:
        VisgraftError: an adapter cannot be read, the cluster has no room or serves already, or the port is taken.
    """
    import ray

    from visgraft.adapters.hub import resolve, settled

    if cluster.places < (cluster.most or 1):
        raise VisgraftError(
            f"the cluster has room for {cluster.places} of {cluster.most} workers with {cluster.share['num_cpus']} "
            f"cores and {cluster.share['num_gpus']:g} GPUs each; lower --workers or --cpus-per-worker"
        )
    with settled():
        given = {name: Sent.of(resolve(path), digest_of(path)) for name, path in adapters.items()}
    _take_over()
    try:
        actor: Any = ray.remote(Keeper)
        settings = {"name": NAME, "namespace": NAME, "max_restarts": -1, "max_task_retries": AGAIN, **ON_HEAD}
        keeper = actor.options(**settings).remote(options.get("store"))
    except ValueError as error:
        raise _is_served() from error
    try:
        place = answer_of(keeper.listen.remote(host, port), 120.0)
        answer_of(keeper.begin.remote(given), 120.0)
        threads = options.get("threads") or cluster.share["num_cpus"]
        config = ServeConfig(**{**options, "store": "the cluster's store", "threads": threads})
        yield RayServer(keeper, config, cluster, host, place)
    finally:
        with contextlib.suppress(VisgraftError, ConnectionError):
            answer_of(keeper.end.remote(), 10.0)
        with contextlib.suppress(ConnectionError):
            ray.kill(keeper)
        ray.shutdown()


def _take_over() -> None:
    """Make room for a server, where the last one was killed and its workers were left.

    Raises:
        VisgraftError: something else answers.
    """
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what goes wrong is said once, by us
    with contextlib.suppress(ValueError):
        ray.get_actor(NAME, namespace=NAME)
        raise _is_served()
    others = serve.status().applications.keys() - {NAME}
    if others:
        raise VisgraftError(
            f"Ray Serve answers on this cluster for {', '.join(sorted(others))} already; give --on another cluster"
        )
    serve.shutdown()


def _is_served() -> VisgraftError:
    return VisgraftError("visgraft serve answers on this cluster already; end it first, or give --on another cluster")


def _end() -> None:
    """Let the workers answer what is under way, and end Ray Serve."""
    from ray import serve

    try:
        serve.delete(NAME)
    finally:
        serve.shutdown()


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Yield what is set by SIGINT or SIGTERM; the second one ends at once."""
    told = threading.Event()

    def tell(number: int, frame: Any) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(error: Exception) -> str:
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]


def deployment(config: ServeConfig, cluster: OnRay) -> Any:
    """Return what Ray Serve runs as workers."""
    from ray import serve

    options = config.to_json()

    def build() -> Any:
        return application(options)

    class Worker:
        app: Any

        async def check_health(self) -> None:
            await self.app.state.server.check()

        def __del__(self) -> None:
            self.app.state.folder.cleanup()

    return serve.deployment(
        serve.ingress(build)(Worker),
        name="Worker",
        num_replicas=cluster.most or 1,
        ray_actor_options=cluster.share,
        max_ongoing_requests=MOST_REQUESTS,
        health_check_timeout_s=CHECK_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )


def application(options: str) -> Any:
    """Return the application of a worker; the keeper is told why there can be none."""
    import ray

    from visgraft.serve.application import make_app

    log_to_stderr()
    keeper = ray.get_actor(NAME, namespace=NAME)  # by name, for a handle of Ray's client means nothing here
    folder = tempfile.TemporaryDirectory(prefix="visgraft-worker-")
    tempfile.tempdir = folder.name  # all that this process writes, for Ray ends it without asking
    try:
        app = make_app(ServeConfig.from_json(options), store=KeptStore(keeper, Path(folder.name)))
    except VisgraftError as error:
        folder.cleanup()
        answer_of(keeper.fail.remote(f"{error} (on {ray.util.get_node_ip_address()})"))
        raise
    app.state.folder = folder
    server, worker = app.state.server, str(ray.get_runtime_context().get_actor_id())[:12]

    async def together(own: bytes) -> bytes:
        try:
            await keeper.tell.remote(worker, own)
            return labelled(await keeper.told.remote())
        except ray.exceptions.RayError:
            return labelled({worker: own})

    def tell() -> None:
        while server.engine.alive:
            server.count()
            keeper.tell.remote(worker, server.metrics.text())
            time.sleep(FIGURES_SECONDS / 12)

    server.together = together
    threading.Thread(target=tell, name="visgraft-figures", daemon=True).start()
    return app
