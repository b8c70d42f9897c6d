"""What the pages link to outside of Gradio: downloads, pictures, whether the server lives. Each finds its object in the workspace of who asks."""

import shutil
import tempfile
from pathlib import Path

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from lora_studio import albums, exports, shelf, studio
from lora_studio.errors import StudioError
from lora_studio.ui.seat import WORKSPACE, Seats, nobody


def add_to(app, seats: Seats) -> None:
    """Put the routes on the application."""
    for path, verb in VERBS.items():
        app.add_api_route(path, _served(verb, seats), methods=["GET"], include_in_schema=False)
    app.add_api_route("/studio/health", lambda: JSONResponse({"state": "ok"}), methods=["GET"], include_in_schema=False)


def _served(verb, seats: Seats):
    async def serve(request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool

        workspace = seats.only or request.scope.get(WORKSPACE) or nobody()
        return await run_in_threadpool(_found, verb, workspace, {**request.query_params, **request.path_params})

    return serve


def _found(verb, workspace, asked: dict) -> Response:
    """The answer of a verb; what is not there is not found."""
    try:
        return verb(workspace, asked)
    except StudioError as error:
        return PlainTextResponse(str(error), status_code=404)


def _download(pack) -> Response:
    """What `pack` writes into a folder, as a .zip that is gone once it was sent."""
    place = Path(tempfile.mkdtemp(prefix="lora-studio-"))
    try:
        archive = pack(place)
    except StudioError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return FileResponse(archive, filename=archive.name, media_type="application/zip", background=BackgroundTask(shutil.rmtree, place, True))


def _picture(file: Path, kind: str = "image/png") -> Response:
    """A picture, which never changes under its name."""
    return FileResponse(file, media_type=kind, headers={"Cache-Control": "private, max-age=86400, immutable"})


VERBS = {
    "/studio/adapter/{id}": lambda workspace, asked: _download(lambda place: studio.adapter_archive(workspace, asked["id"], place)),
    "/studio/library/{id}": lambda workspace, asked: _download(lambda place: shelf.archive(workspace, asked["id"], place)),
    "/studio/sample/{id}/{name}": lambda workspace, asked: _picture(studio.sample(workspace, asked["id"], asked["name"])),
    "/studio/picture/{name}": lambda workspace, asked: _picture(studio.picture(workspace, asked["name"])),
    "/studio/album/{album}/{name:path}": lambda workspace, asked: _picture(albums.thumbnail(workspace, asked["album"], asked["name"], asked.get("size", "small")), "image/jpeg"),
    "/studio/export/{token}/{name}": lambda workspace, asked: FileResponse(
        exports.file(workspace, asked["token"], asked["name"]), filename=asked["name"], media_type="application/octet-stream"
    ),
}
