"""The server of the page: it serves one user on this machine by HTTP, and keeps no state.

It is bounded in memory and time, whoever sends what: by the size of a body, the number and patience
of connections, and the number of requests that wait while one is computed.
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.bugs import bug_report
from equipoise.data import Data
from equipoise.explorer.views import MAX_CODES, View
from equipoise.model import VAE
from equipoise.run import Run
from equipoise.text import visible

try:
    import uvicorn
    from h11 import LocalProtocolError
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from equipoise.explorer.connections import ImpatientProtocol
except ImportError as error:
    raise ImportError(
        "the explorer needs Starlette and uvicorn: pip install 'equipoise[explore]'"
    ) from error

ADDRESS, DEFAULT_PORT = "127.0.0.1", 8769
PAGE = Path(__file__).parent / "page"
MAX_UPLOAD_BYTES = 20_000_000
"""Largest size of an uploaded example."""
BYTES_OF_NUMBER, BYTES_OF_REQUEST = 40, 10_000
"""Largest size of a number in a request, and of all that is no code."""
MAX_UPLOADS, MAX_WAITING = 4, 32
"""Number of uploads that are held in memory, and of requests that wait while one is computed."""
LONGEST_TEXT = 300
"""Number of characters of an error message, and of the text that it quotes."""
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
    start: NDArray[Any] | None = None,
) -> None:
    r"""Open a page on which to explore a trained model, and serve it until the user interrupts.

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
        start: The example that the page begins with, (1, \*), raw units.

    Raises:
        ValueError: If the port is taken, or if the data are not those of the run.
    """
    if data is not None:
        run.check_data(data)

    with _listen(port) as listener:
        name = visible(run.folder.resolve().name)
        view = View((model or run.model()).eval(), run.mixture(), data, name, start)
        server = make_server(view)

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


def make_server(view: View) -> uvicorn.Server:
    """Make the server of a view.

    Args:
        view: What the page shows of the model.

    Returns:
        A server that is ready to run.
    """
    return uvicorn.Server(
        uvicorn.Config(
            _Bugs(make_app(view)),
            http=ImpatientProtocol,
            log_level="critical",  # requests are answered, and bugs are told by the application
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
    )


def make_app(view: View) -> Starlette:
    """Make the application that serves a view and the page on it.

    Args:
        view: What the page shows of the model.

    Returns:
        An ASGI application.
    """
    worker = _Worker()
    uploads = asyncio.Semaphore(MAX_UPLOADS)
    # A view does not change.
    about_view = JSONResponse(view.about()).body

    async def about(_: Request) -> Response:
        return Response(about_view, media_type="application/json")

    async def decode(request: Request) -> Response:
        content = await _json(request)
        if "point" in content:
            point = _numbers([content["point"]], 2)[0]
            return await worker.run(lambda: _decoded(view, view.code_at(point)))

        codes = _numbers(content.get("codes"), view.model.latent_dim)
        return await worker.run(lambda: _decoded(view, codes))

    async def draws(request: Request) -> Response:
        code = _numbers((await _json(request)).get("codes"), view.model.latent_dim)[:1]
        return await worker.run(lambda: _numbers_of(view.draws(code)))

    async def sample(request: Request) -> Response:
        content = await _json(request)
        source = _short(content, "source")
        n, seed = _whole(content, "n"), _whole(content, "seed")
        return await worker.run(lambda: _decoded(view, view.sample(source, n, seed)))

    async def inspect(request: Request) -> Response:
        # The body is in memory until the answer.
        async with uploads:
            upload = await request.body()
            return await worker.run(lambda: _inspected(view, view.read(upload)))

    async def example(request: Request) -> Response:
        index = _whole(await _json(request), "index")
        return await worker.run(lambda: _inspected(view, view.example(index)))

    async def refuse(_: Request, error: Exception) -> Response:
        return PlainTextResponse(visible(str(error), LONGEST_TEXT), status_code=400)

    async def forget(_: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    async def answer_bug(_: Request, error: Exception) -> Response:
        return PlainTextResponse("this is a bug of equipoise; see its terminal", 500)

    max_json = BYTES_OF_REQUEST + MAX_CODES * view.model.latent_dim * BYTES_OF_NUMBER

    return Starlette(
        routes=[
            Route("/about", about),
            Route("/decode", decode, methods=["POST"], max_body_size=max_json),
            Route("/draws", draws, methods=["POST"], max_body_size=max_json),
            Route("/sample", sample, methods=["POST"], max_body_size=max_json),
            Route("/inspect", inspect, methods=["POST"]),
            Route("/example", example, methods=["POST"], max_body_size=max_json),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, [ADDRESS, "localhost"]),
            Middleware(_SameOrigin),
        ],
        exception_handlers={
            ValueError: refuse,
            ClientDisconnect: forget,
            Exception: answer_bug,
        },
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


class _Bugs:
    """Tells a bug of ours in one line, once for each kind of error and address."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.told: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except LocalProtocolError:
            pass  # the client has broken the rules of HTTP after a request, and was refused
        except Exception as error:  # it has been answered
            kind = f"{type(error).__name__} {scope['path']}"
            if kind in self.told or len(self.told) >= MAX_WAITING:
                return

            self.told.add(kind)
            message = bug_report(error, ["equipoise", "explore"])
            logging.getLogger("equipoise").error("equipoise: %s", visible(message))


class _Worker:
    """Computes one answer after another, while the server goes on listening."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0

    async def run(self, compute: Callable[[], Response]) -> Response:
        """Compute an answer in a thread, when its turn has come."""
        if self.waiting >= MAX_WAITING:
            raise HTTPException(503, "too many requests at once; try again in a moment")

        self.waiting += 1
        try:
            async with self.lock:
                return await run_in_threadpool(compute)
        finally:
            self.waiting -= 1


async def _json(request: Request) -> dict[str, Any]:
    """The JSON object that a request holds."""
    body = await request.body()
    try:
        content = json.loads(body, object_pairs_hook=_without_doubles, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("expected a JSON object that is not nested as deeply") from error

    if not isinstance(content, dict):
        raise ValueError("expected a JSON object")
    return content


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("expected a JSON object with every key once")
    return content


def _no_number(name: str) -> float:
    """Refuse NaN and Infinity, which JSON does not have."""
    raise ValueError(f"expected finite numbers, got {name}")


def _whole(content: dict[str, Any], name: str) -> int:
    """A whole number of a request, at least 0 and below 2^32."""
    value = content.get(name)
    if type(value) is not int or not 0 <= value < 2**32:
        raise ValueError(f"expected a whole number from 0 to {2**32 - 1} as {name!r}")

    return value


def _short(content: dict[str, Any], name: str) -> str:
    """A short text of a request."""
    value = content.get(name)
    if not isinstance(value, str) or len(value) > LONGEST_TEXT // 10:
        raise ValueError(f"expected a short text as {name!r}")

    return value


def _numbers(rows: object, width: int) -> NDArray[np.float64]:
    """A list of codes, or of points, of a request."""
    expected = f"expected 1 to {MAX_CODES} lists of {width} numbers below {LARGEST_NUMBER:g}"
    if not isinstance(rows, list):
        raise ValueError(expected)
    if not 1 <= len(rows) <= MAX_CODES:
        raise ValueError(f"{expected}, got {len(rows)} lists")

    for row in rows:
        if not isinstance(row, list) or len(row) != width:
            raise ValueError(expected)
        if not all(type(number) in (int, float) and abs(number) < LARGEST_NUMBER for number in row):
            raise ValueError(expected)
    return np.array(rows, np.float64)


def _inspected(view: View, raw: NDArray[Any]) -> Response:
    """The answer that holds what the model computes for an input."""
    return JSONResponse(view.inspect(raw)._asdict())


def _decoded(view: View, codes: NDArray[Any]) -> Response:
    """The answer that holds decoded codes."""
    return _numbers_of(view.decode(codes))


def _numbers_of(values: NDArray[Any]) -> Response:
    """The answer that holds little-endian float32 numbers."""
    content = values.astype("<f4").tobytes()
    return Response(content, media_type="application/octet-stream")
