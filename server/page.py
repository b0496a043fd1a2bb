"""The chat page at `/`: static files that use the public API only. They hold no data, so they need no API key."""

from pathlib import Path

from aiohttp import web

from qjax.server.errors import Handler
from qjax.server.routes import Route

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = {
    "/" if file.name == "index.html" else f"/page/{file.name}": file
    for file in sorted(_FOLDER.iterdir())
    if file.suffix in _TYPES
}
_HEADERS = {
    # nothing from elsewhere, nothing inline: what a model writes cannot become a script
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask each time; the answer is 304 while the file is the same
}


def _handler(file: Path) -> Handler:
    async def page(request: web.Request) -> web.FileResponse:
        return web.FileResponse(file, headers={**_HEADERS, "Content-Type": f"{_TYPES[file.suffix]}; charset=utf-8"})

    return page


PAGE_ROUTES = [
    Route("GET", path, _handler(file), "The chat page", needs_engine=False, is_open=True, answer=_TYPES[file.suffix])
    for path, file in _FILES.items()
]
