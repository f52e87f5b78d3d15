"""Adapters as resources: listed, added by upload or by path, replaced and removed while the server answers."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.datastructures import UploadFile

from visgraft.adapters.directory import read_record
from visgraft.adapters.hub import UNLIKE
from visgraft.adapters.reference import read_content
from visgraft.errors import VisgraftError
from visgraft.serve.bodies import ADAPTER
from visgraft.serve.engine import QueueFullError
from visgraft.serve.hosting import HostedAdapter, inside, uploaded
from visgraft.serve.replies import Adapters, OneAdapter, one_adapter
from visgraft.serve.server import Server
from visgraft.serve.store import StoreError

Put = tuple[HostedAdapter, bool]
PARTS = ("config", "tensors", "unlike")
"""Of the form with which an adapter is sent; the last need not be there."""
FORM, MORE = "-F config=@adapter_config.json -F tensors=@adapter_model.safetensors", f"perhaps -F unlike=@{UNLIKE}"
MOST_CONFIG = 2**20  # bytes of an adapter_config.json
MOST_PARTS = 16  # of a form that are read, so that one too many is named


def add_adapters(app: FastAPI, server: Server) -> None:
    """Add the routes."""
    config = server.config

    def about(name: str, hosted: HostedAdapter) -> OneAdapter:
        return one_adapter(name, hosted, name in config.pinned)

    @app.get("/adapters", response_model=Adapters, response_model_exclude_defaults=True)
    async def adapters() -> Any:
        """List the adapters, with their classes and figures."""
        hosted = (await server.current()).adapters
        limits = {"body_bytes": config.max_body, "pixels": config.max_pixels, "images": config.max_images}
        limits |= {"answers": config.max_queue, "top": 1000}
        backbone = next(iter(hosted.values())).record.backbone.name if hosted else None
        return {"backbone": backbone, "limits": limits, "adapters": [about(*one) for one in hosted.items()]}

    @app.get("/adapters/{name:path}", response_model=OneAdapter, response_model_exclude_defaults=True)
    async def adapter(name: str) -> Any:
        """Tell of one adapter."""
        return about(name, (await server.current()).get(name))

    @app.put(
        "/adapters/{name:path}",
        response_model=OneAdapter,
        response_model_exclude_defaults=True,
        status_code=201,
        openapi_extra=ADAPTER,
    )
    async def put(name: str, request: Request, response: Response) -> Any:
        """Add an adapter, or put it in place of another: its files, or a path below the server's folder."""
        form = request.headers.get("content-type", "").lower().startswith("multipart/")
        hosted, before = await (_put_files if form else _put_path)(server, name, request)
        response.status_code = 200 if before else 201
        return about(name, hosted)

    @app.delete("/adapters/{name:path}", status_code=204)
    async def delete(name: str) -> None:
        """Answer with an adapter no more."""
        await server.load(lambda: server.hosting.remove(name))


async def _put_path(server: Server, name: str, request: Request) -> Put:
    try:
        path = (await request.json())["path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise HTTPException(422, 'send the files config and tensors as a form, or JSON {"path": ...}') from None
    if server.config.adapters is None or not isinstance(path, str):
        raise HTTPException(422, "path must be a text, and the server started with --adapters; or send the files")
    place = inside(server.config.adapters, path)
    return await server.load(lambda: _loaded(server, name, place, path, False))


async def _put_files(server: Server, name: str, request: Request) -> Put:
    async with request.form(max_files=MOST_PARTS, max_fields=MOST_PARTS) as form:
        files = {part: file for part, file in form.multi_items() if isinstance(file, UploadFile)}
        if not {"config", "tensors"} <= files.keys():
            raise HTTPException(422, f"send the two files of an adapter: {FORM}")
        if wrong := [part for part, file in form.multi_items() if part not in PARTS or file is not files.get(part)]:
            raise HTTPException(422, f"part {wrong[0]!r:.60} is no file of an adapter, or sent twice: {FORM}, {MORE}")
        sent = {part: await file.read() for part, file in files.items()}
        facts, tensors, unlike = sent["config"], sent["tensors"], sent.get("unlike")
    if len(facts) > MOST_CONFIG:
        raise HTTPException(413, f"config is larger than {MOST_CONFIG:,} bytes, so it is no adapter_config.json")

    def load() -> Put:
        with uploaded(facts, tensors, unlike) as folder:
            return _loaded(server, name, folder, "the adapter that was sent", True)

    return await server.load(load)


def _loaded(server: Server, name: str, place: Path, called: str, keep: bool) -> Put:
    """Load an adapter; what is wrong with it is told without the place where it lies here."""
    try:
        if keep and (place / UNLIKE).exists():  # whoever sends it wants it used
            read_content(place, read_record(place))
        return server.hosting.put(name, place, keep=keep)
    except (StoreError, QueueFullError):
        raise
    except VisgraftError as error:
        raise VisgraftError(str(error).replace(f"{place}/", "").replace(str(place), called)) from error
