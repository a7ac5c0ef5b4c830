"""The server of the page: it serves one user on this machine by HTTP, and keeps no state."""

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
"""Largest size of a request's body."""
LARGEST_NUMBER = 1e6
"""Bound on each number of a code.

No code that a model has learned comes near it, and float32 overflows far above it.
"""
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
        "form-action 'none'"
    ),
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
    """Open a page on which to explore a trained model, and serve it until the user interrupts.

    The page is served on 127.0.0.1 alone. Requests from pages of other sites are refused.

    Args:
        run: A finished training.
        data: The data that the run was trained on. If None, the map is drawn from the mixture, and
            inputs are not ranked among validation examples.
        model: The model of the run. It is needed if the networks are the user's own.
        port: The port to serve at. If None, the default port, or any free port if the default is
            taken.
        open_browser: Whether to show the page in the user's browser.
        on_ready: Called with the address of the page.

    Raises:
        ValueError: If the port is taken, or if the data are not those of the run.
    """
    if data is not None:
        run.check_data(data)

    with _listen(port) as listener:
        name = run.folder.resolve().name
        view = View((model or run.model()).eval(), run.mixture(), data, name)
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(view),
                log_level="warning",
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=1,
            )
        )

        url = f"http://{ADDRESS}:{listener.getsockname()[1]}/"
        on_ready(url)
        if open_browser:
            webbrowser.open(url)

        # uvicorn handles the interrupt, ends, and then raises it again.
        with contextlib.suppress(KeyboardInterrupt):
            server.run([listener])


def _listen(port: int | None) -> socket.socket:
    """Open the socket to serve at; see :func:`explore` for the port."""
    if port is not None and not 0 <= port <= 65535:
        raise ValueError(f"expected a port from 0 to 65535, got {port}")

    try:
        listener = socket.create_server((ADDRESS, DEFAULT_PORT if port is None else port))
    except OSError as error:
        if port is not None or error.errno != errno.EADDRINUSE:
            reason = os.strerror(error.errno or 0)
            raise ValueError(
                f"port {port or DEFAULT_PORT} cannot be used ({reason}); choose another"
            ) from error

        listener = socket.create_server((ADDRESS, 0))

    # Without this option, the body of an answer waits 40 ms until the receipt of its head is
    # confirmed. Each connection inherits it. asyncio sets it too, but not on a socket that was
    # handed to it, as this one is.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def make_app(view: View) -> Starlette:
    """Make the application that serves a view and the page on it.

    Args:
        view: What the page shows of the model.

    Returns:
        An ASGI application.
    """

    async def about(_: Request) -> Response:
        return JSONResponse(view.about())

    async def decode(request: Request) -> Response:
        content = await _json(request)
        if "point" in content:
            return _decoded(view, view.code_at(_numbers(content["point"], (2,))))

        codes = _numbers(content.get("codes"), (None, view.model.latent_dim))
        if not 1 <= len(codes) <= MAX_CODES:
            raise ValueError(f"1 to {MAX_CODES} codes are decoded at once, got {len(codes)}")

        return _decoded(view, codes)

    async def sample(request: Request) -> Response:
        content = await _json(request)
        source = str(content.get("source"))
        n, seed = _whole(content, "n"), _whole(content, "seed")
        return _decoded(view, view.sample(source, n, seed))

    async def inspect(request: Request) -> Response:
        raw = view.read(await request.body())
        return JSONResponse(view.inspect(raw)._asdict())

    async def example(request: Request) -> Response:
        index = _whole(await _json(request), "index")
        return JSONResponse(view.inspect(view.example(index))._asdict())

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
    """Refuses requests from pages of other sites, and keeps those pages from embedding answers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        origin = request.headers.get("origin")
        if origin not in (None, f"http://{request.headers['host']}"):
            refusal = PlainTextResponse("requests from other sites are refused", 403)
            await refusal(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                for name, value in HEADERS.items():
                    message["headers"].append((name.encode(), value.encode()))

            await send(message)

        await self.app(scope, receive, send_with_headers)


async def _json(request: Request) -> dict[str, Any]:
    """The JSON object that a request holds."""
    content = await request.json()
    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")

    return content


def _whole(content: dict[str, Any], name: str) -> int:
    """A whole number of a request, at least 0 and below 2^32."""
    value = content.get(name)
    if type(value) is not int or not 0 <= value < 2**32:
        raise ValueError(f"expected a whole number, not negative, as {name!r}, got {value!r}")

    return value


def _numbers(value: object, shape: tuple[int | None, ...]) -> NDArray[np.float64]:
    """An array of a request; None in the shape stands for any size."""
    expected = " x ".join("n" if size is None else str(size) for size in shape)
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected {expected} numbers") from error

    fits = numbers.ndim == len(shape) and all(
        size in (None, actual) for size, actual in zip(shape, numbers.shape, strict=True)
    )
    if not fits or not (np.abs(numbers) < LARGEST_NUMBER).all():
        raise ValueError(
            f"expected {expected} numbers below {LARGEST_NUMBER:g}, got shape {numbers.shape}"
        )

    return numbers


def _decoded(view: View, codes: NDArray[Any]) -> Response:
    """The answer that holds decoded codes, as little-endian float32 numbers."""
    content = view.decode(codes).astype("<f4").tobytes()
    return Response(content, media_type="application/octet-stream")
