"""The HTTP application: the page, pictures by multipart form, figures, and what is answered to mistakes."""

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator
from importlib import resources
from typing import Annotated, Any

import swagger_ui_bundle
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import PlainTextResponse
from fastapi.staticfiles import StaticFiles
from PIL import EpsImagePlugin
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as BaseHTTPException
from starlette.requests import ClientDisconnect

from visgraft.errors import VisgraftError
from visgraft.serve.answering import SentPicture
from visgraft.serve.bodies import PICTURES
from visgraft.serve.clients import add_clients
from visgraft.serve.covering import check_covering
from visgraft.serve.engine import QueueFullError
from visgraft.serve.guard import Guard, said
from visgraft.serve.hosting import NoAdapterError
from visgraft.serve.marking import check_marking
from visgraft.serve.replies import AnswerList, AsciiJson, ErrorReply, answer_to
from visgraft.serve.resources import add_adapters
from visgraft.serve.server import Server
from visgraft.serve.settings import ServeConfig
from visgraft.serve.store import Store, StoreError, StoreLostError
from visgraft.version import __version__

LOG = logging.getLogger(__name__)
RETRY_SECONDS = 5
CLIENT_LEFT = 499  # as nginx logs it; nobody is there to read it
PAGE = {
    "page.css": "text/css",
    **dict.fromkeys(("page.js", "asking.js", "marking.js", "showing.js"), "text/javascript"),
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 404, 408, 413, 421, 422, 429, 503, 507)
}


def make_app(config: ServeConfig, *, strict: bool = True, store: Store | None = None) -> FastAPI:
    """Return the application; the backbone and all adapters are loaded when it returns.

    Args:
        config: its options.
        strict: whether an adapter that cannot be loaded is an error, and not left out.
        store: where all processes see which adapters there are; None: in the folder `config.store`.

    Raises:
        VisgraftError: one cannot be loaded; or, without `strict`, none.
    """
    EpsImagePlugin.gs_binary = False  # Pillow would hand the programs that such pictures are to Ghostscript
    server = Server(config, store)
    server.hosting.refresh(strict=strict)
    if not server.hosting.adapters:
        raise VisgraftError(f"none of the adapters in {config.store} can be loaded; start the server anew")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.draining = True
        await asyncio.to_thread(server.close)

    app = FastAPI(
        title="visgraft",
        version=__version__,
        summary="Classes of pictures, by any number of adapters on one backbone.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        default_response_class=AsciiJson,
    )
    app.state.server = server
    app.add_middleware(Guard, config=config, metrics=server.metrics)
    _handle_errors(app)
    add_pages(app)
    add_adapters(app, server)
    add_predict(app, server)
    add_operations(app, server)
    add_clients(app, server)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(BaseHTTPException)
    async def refused(request: Request, error: Any) -> Response:
        return said(error.status_code, str(error.detail), getattr(error, "headers", None))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return said(422, f"{'.'.join(map(str, first['loc'][1:])) or 'the request'}: {first['msg']}")

    @app.exception_handler(VisgraftError)
    async def wrong(request: Request, error: VisgraftError) -> Response:
        return _wrong(error)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return said(CLIENT_LEFT, "the client left before it had sent all")

    @app.exception_handler(OSError)
    async def full(request: Request, error: OSError) -> Response:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise error
        LOG.error("%s; make room for what is sent", error)
        return said(507, "the server has no room for what was sent; send it in smaller parts, or later")

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return said(500, "the server failed; its log says why")


def _wrong(error: VisgraftError) -> Response:
    """Return what is answered to an error of ours."""
    if isinstance(error, QueueFullError):
        return said(429, str(error), {"retry-after": f"{error.seconds:.0f}"})
    if isinstance(error, StoreLostError):
        LOG.error("%s", error)
        told = "the keeper of the adapters gave no answer; see in GET /adapters whether this was done, and try again"
        return said(503, told, {"retry-after": f"{RETRY_SECONDS}"})
    if isinstance(error, StoreError):
        LOG.error("%s", error)
        return said(507, "the server cannot use its store of adapters, so none has changed; its log says why")
    return said(404 if isinstance(error, NoAdapterError) else 422, str(error))


def add_predict(app: FastAPI, server: Server) -> None:
    """Pictures in, classes out."""

    @app.post("/predict", response_model=AnswerList, openapi_extra=PICTURES)
    async def predict(
        request: Request,
        adapter: Annotated[list[str], Query(description="which is to answer; several answer each")] = [],  # noqa: B006
        top: Annotated[int | None, Query(ge=1, le=1000, description="classes to name; none: 5")] = None,
        coverage: Annotated[
            float | None, Query(gt=0, lt=1, description="name a set that holds the truth with this probability")
        ] = None,
        unlike: Annotated[
            float | None, Query(gt=0, lt=1, description="mark pictures as far as so few like the training's are, 0.05")
        ] = None,
    ) -> Any:
        """Name the classes of pictures: parts of a multipart form, or one picture as the body."""
        if coverage is not None or unlike is not None:
            hosting = await server.current()
            asked = {name: hosting.get(name) for name in adapter or hosting.adapters}
            check_covering(coverage, ((name, one.record) for name, one in asked.items()), top=top)
            check_marking(unlike, asked.items())
        pictures = await pictures_of(request, server.config.max_images)
        found, seconds = await server.answer(request, pictures, adapter, look=unlike is not None)
        answers = [answer_to(one, top or 5, coverage, unlike) for one in found]
        if all(one.adapter is None for one in found):
            broken = {"error": found[0].error, "answers": [a.model_dump(exclude_none=True) for a in answers]}
            return AsciiJson(broken, 422)
        whole = AnswerList(answers=answers, milliseconds=seconds.milliseconds())
        return AsciiJson(whole.model_dump(exclude_none=True))


async def pictures_of(request: Request, most: int) -> list[SentPicture]:
    """Return the pictures in a request's body, a multipart form or one picture."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/"):
        content = await request.body()
        return [SentPicture("the picture", content)] if content else []
    async with request.form(max_files=most + 1, max_fields=100) as form:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        return [SentPicture(_called(file.filename, number), await file.read()) for number, file in enumerate(files, 1)]


def _called(name: str | None, number: int) -> str:
    """Return what to call a file that was sent: its name without folders."""
    return (name or "").replace("\\", "/").rpartition("/")[2].replace("\0", "")[:200] or f"picture {number}"


def add_operations(app: FastAPI, server: Server) -> None:
    """What keeps a server running."""

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures in Prometheus' format."""
        return Response(await server.figures(), media_type="text/plain; version=0.0.4")


def add_pages(app: FastAPI) -> None:
    """The page for people, and the one that lists the routes."""
    folder = resources.files("visgraft.serve")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response((folder / "page.html").read_bytes(), media_type="text/html; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="visgraft",
            swagger_js_url="/docs/swagger-ui-bundle.js",
            swagger_css_url="/docs/swagger-ui.css",
            swagger_favicon_url="/docs/favicon-32x32.png",
        )

    app.mount("/docs", StaticFiles(directory=swagger_ui_bundle.swagger_ui_path))

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in PAGE:
            raise HTTPException(404, "there is no such part of the page")
        return Response((folder / name).read_bytes(), media_type=f"{PAGE[name]}; charset=utf-8")
