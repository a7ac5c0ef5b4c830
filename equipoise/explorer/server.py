"""The page's server: HTTP on this machine alone, one user, no state."""

import contextlib
import errno
import os
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.data import Data
from equipoise.explorer.views import MAX_CODES, View
from equipoise.model import VAE
from equipoise.run import Run

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ImportError(
        "the explorer needs Starlette and uvicorn: pip install 'equipoise[explore]'"
    ) from error

ADDRESS, DEFAULT_PORT = "127.0.0.1", 8769
PAGE = Path(__file__).parent / "page"
MAX_UPLOAD_BYTES = 20_000_000
LARGEST_NUMBER = 1e6
"""In a code: of none that a model has learned, and far from where float32 overflows."""
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


def explore(
    run: Run,
    data: Data | None = None,
    *,
    model: VAE | None = None,
    port: int | None = None,
    open_browser: bool = True,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Open a page on which to look around in a trained model, until interrupted.

    It is served on 127.0.0.1 alone, to pages of its own.

    Args:
        run: finished training.
        data: what it was trained on. None draws the map from the mixture, and no input is ranked.
        model: the run's model, where it has networks of the user's own.
        port: to serve at; the default, or any that is free if it is taken, if None.
        open_browser: show the page in the user's browser.
        on_ready: told of the page's address.

    Raises:
        ValueError: if the port is taken, or the data are not those of the run.
    """
    if data is not None:
        run.check_data(data)
    with _listen(port) as listener:
        app = make_app(
            View((model or run.model()).eval(), run.mixture(), data, run.folder.resolve().name)
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=1
            )
        )
        url = f"http://{ADDRESS}:{listener.getsockname()[1]}/"
        on_ready(url)
        if open_browser:
            webbrowser.open(url)
        with contextlib.suppress(
            KeyboardInterrupt
        ):  # uvicorn has ended by then, and raises it again
            server.run([listener])


def _listen(port: int | None) -> socket.socket:
    if port is not None and not 0 <= port <= 65535:
        raise ValueError(f"expected a port from 0 to 65535, got {port}")
    try:
        listener = socket.create_server((ADDRESS, DEFAULT_PORT if port is None else port))
    except OSError as error:
        if port is not None or error.errno != errno.EADDRINUSE:
            raise ValueError(
                f"port {port or DEFAULT_PORT} cannot be used ({os.strerror(error.errno or 0)}); choose another"
            ) from error
        listener = socket.create_server((ADDRESS, 0))
    # Inherited by each connection. asyncio sets it too, but not on sockets that were handed to it like this one;
    # without it an answer's body waits 40 ms for the receipt of its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def make_app(view: View) -> Starlette:
    """Make the application that serves a view and the page on it.

    Args:
        view: what answers.

    Returns:
        An ASGI application.
    """

    async def about(_: Request) -> Response:
        return JSONResponse(view.about())

    async def decode(request: Request) -> Response:
        asked = await _json(request)
        if "point" in asked:
            return _decoded(view, view.code_at(_numbers(asked["point"], (2,))))
        codes = _numbers(asked.get("codes"), (None, view.model.latent_dim))
        if not 1 <= len(codes) <= MAX_CODES:
            raise ValueError(f"1 to {MAX_CODES} codes are decoded at once, got {len(codes)}")
        return _decoded(view, codes)

    async def sample(request: Request) -> Response:
        asked = await _json(request)
        return _decoded(
            view, view.sample(str(asked.get("source")), _whole(asked, "n"), _whole(asked, "seed"))
        )

    async def inspect(request: Request) -> Response:
        return JSONResponse(view.inspect(view.read(await request.body()))._asdict())

    async def example(request: Request) -> Response:
        return JSONResponse(
            view.inspect(view.example(_whole(await _json(request), "index")))._asdict()
        )

    async def refuse(_: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), status_code=400)

    return Starlette(
        routes=[
            Route("/about", about),
            Route("/decode", decode, methods=["POST"]),
            Route("/sample", sample, methods=["POST"]),
            Route("/inspect", inspect, methods=["POST"]),
            Route("/example", example, methods=["POST"]),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, [ADDRESS, "localhost"]),
            Middleware(_SameOrigin),
        ],
        exception_handlers={ValueError: refuse},
        max_body_size=MAX_UPLOAD_BYTES,
    )


class _SameOrigin:
    """Refuses what pages of other sites send, and keeps them from embedding what is answered."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        origin = request.headers.get("origin")
        if origin not in (None, f"http://{request.headers['host']}"):
            await PlainTextResponse("requests from other sites are refused", 403)(
                scope, receive, send
            )
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [
                    (name.encode(), value.encode()) for name, value in HEADERS.items()
                ]
            await send(message)

        await self.app(scope, receive, send_with_headers)


async def _json(request: Request) -> dict[str, Any]:
    asked = await request.json()
    if not isinstance(asked, dict):
        raise ValueError("expected a JSON object")
    return asked


def _whole(asked: dict[str, Any], name: str) -> int:
    value = asked.get(name)
    if type(value) is not int or not 0 <= value < 2**32:
        raise ValueError(f"expected a whole number, not negative, as {name!r}, got {value!r}")
    return value


def _numbers(value: object, shape: tuple[int | None, ...]) -> NDArray[np.float64]:
    expected = " x ".join("n" if size is None else str(size) for size in shape)
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected {expected} numbers") from error
    fits = numbers.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, numbers.shape, strict=True)
    )
    if not fits or not (np.abs(numbers) < LARGEST_NUMBER).all():
        raise ValueError(
            f"expected {expected} numbers below {LARGEST_NUMBER:g}, got shape {numbers.shape}"
        )
    return numbers


def _decoded(view: View, codes: NDArray[Any]) -> Response:
    return Response(
        view.decode(codes).astype("<f4").tobytes(), media_type="application/octet-stream"
    )
