"""`llmkernel serve MODEL…`: an OpenAI-compatible endpoint.

Reading order: `serve` -> what is needed -> the socket -> the server, which drains before it ends.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Annotated, Any

import typer

from .sampling import DTYPES, Dtype


def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Folders or Hub ids of causal models.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="A peft LoRA adapter, served as NAME; NAME=MODEL:FOLDER: on MODEL."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=16, help="Requests that a model runs together.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; one more is answered with 429.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most new tokens of a request, and the default.")] = 1024,
    memory: Annotated[
        str | None, typer.Option(help="The most that loaded models take, such as 2GB; the least recently used go.")
    ] = None,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that running requests get to end after SIGTERM.")] = 30,
    dtype: Dtype = "auto",
) -> dict[str, Any]:
    """Serve models over HTTP: /v1/models, /v1/completions and /v1/chat/completions, with streaming.

    A model is named by the last part of its path, loaded when first asked for (the others pause meanwhile), and runs
    several requests at a time: they join and leave between two tokens. Layers that forget tokens (sliding windows) run
    one request at a time. An adapter shares the weights of the model that it names as its base, or of MODEL, and runs
    its requests apart from the base's. SIGTERM and Ctrl-C stop accepting, let running requests end, and exit with 0; a
    second Ctrl-C does not wait for them.
    --memory counts weights, as stored and as laid out for the kernels; keys and values of running requests come on top.

    Raises:
        ValueError: no such checkpoint or adapter, two of the same name, an adapter of another model, a model above the
            budget, a port in use, a missing extra.
    """
    from ..convert.command import parse_size
    from ..evaluate.source import model_titles

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}.")
    _need_extra()
    budget = None if memory is None else parse_size(memory, "memory")

    from .adapters import named_adapters
    from .endpoints import build_app
    from .engine import Engine, Served

    names = model_titles(models)
    if alike := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"MODEL={alike[0]}: is the name of two models; rename a folder, or link to it under another.")
    served = [Served(name, model) for name, model in zip(names, models, strict=True)]
    adapters = named_adapters(adapter or [], served)
    with _listen(host, port) as listening:  # before a model is loaded for nothing
        engine = Engine([*served, *adapters], dtype, batch, budget)
        try:
            if len(served) == 1:
                engine.release(engine.use(served[0].name).result())
            address = f"http://{host}:{listening.getsockname()[1]}/v1"
            app = build_app(engine, max_tokens, batch + queue)
            server = _server(app, drain)
            with _signals_to(server.handle_exit):
                print(f"{address} serves {', '.join(engine.served)}", file=sys.stderr, flush=True)
                server.run(sockets=[listening])
        finally:  # a thread that runs on would end the interpreter badly
            with _signals_to(_leave):
                engine.stop()
    return {"address": address, "models": list(engine.served), "requests": app.state.gate.answered}


def render_serve(result: dict[str, Any]) -> str:
    """Nothing: what there was to say is on standard error."""
    return ""


def _need_extra() -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError("serve: fastapi, uvicorn or openai is not installed; pip install 'hf_llmkernel[serving]'.")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"port={port}: cannot listen at {host} ({error.strerror}); choose another.") from None


def _server(app: Any, drain: int) -> Any:
    """A server that signals are handed to by `_signals_to`: the first ends it, after Ctrl-C a second does not wait."""
    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:
            return contextlib.nullcontext()

    async def drained(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            if not server.should_exit:
                raise
            # Else the time to drain is over: the connection is closed, which is no fault to be told of.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    settings = {"log_level": "warning", "access_log": False, "interface": "asgi3", "lifespan": "off"}
    server = Server(uvicorn.Config(drained, timeout_graceful_shutdown=drain, **settings))
    return server


@contextlib.contextmanager
def _signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within it, in the main thread, SIGINT and SIGTERM call this and do nothing else."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handling in before.items():
            signal.signal(number, handling)


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends at once, whatever the engine is at: a model may be loading, and who asks again does not wait for it."""
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)
