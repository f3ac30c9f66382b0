"""The HTTP side of `llmkernel serve`: OpenAI's endpoints on the handlers of `transformers serve`, run by the engine.

transformers' parts read chat templates, parse tool calls and reasoning, and write the answers and their events. From
here are what is let in (`checks.py`), limits, and where tokens come from: the engine's batches and native kernels.

Reading order: the application -> limits and disconnection -> handlers -> tokens of a request to text.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as HTTPError
from starlette.requests import ClientDisconnect
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    DirectStreamer,
    GenerationState,
    _StreamError,
    get_response_template,
)

from .batch import Request as Sequence
from .checks import check_chat, check_completion, check_fields, uses_tools
from .command import check_tokens, room_after
from .engine import Engine, Served
from .sampling import sampling_options
from .stop import StopStrings, cut

# They would warn of every request that comes in.
logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)

GONE = 499  # the client has closed the connection; nobody reads this
MOST_BYTES = 16 * 2**20  # of a request's body


def build_app(engine: Engine, most_tokens: int, most_requests: int) -> FastAPI:
    """The application.

    Args:
        most_tokens: that a request may ask for, and what it gets that does not say.
        most_requests: that may run or wait; one more is answered with 429.
    """
    app = FastAPI(title="llmkernel serve", docs_url=None, redoc_url=None, openapi_url=None)
    gate = Gate(most_requests)
    models = Models(engine)
    chat = ChatHandler(models, most_tokens)
    completion = TextHandler(models, most_tokens)
    app.state.gate = gate

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await gate.answer(request, chat.handle_request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await gate.answer(request, completion.handle_request)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [described(served) for served in engine.served.values()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return described(engine.served[models.named(name)])

    def described(served: Served) -> dict[str, Any]:
        parent = None if served.base is None else served.base.name
        created = int(gate.started)
        return {"id": served.name, "object": "model", "created": created, "owned_by": "llmkernel", "parent": parent}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        running, waiting = engine.counts()
        return {"status": "ok", "loaded": engine.loaded(), "running": running, "waiting": waiting}

    @app.exception_handler(HTTPError)
    async def refused(request: Request, error: HTTPError) -> JSONResponse:
        unknown = error.detail == "Not Found"
        message = f"{request.url.path}: is not served" if unknown else str(error.detail)
        return error_response(error.status_code, message, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"unexpected {type(error).__name__}: {' '.join(str(error).split())}")

    return app


def error_response(status: int, message: str, headers: Any = None) -> JSONResponse:
    return JSONResponse(error_body(status, message), status, headers)


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


class Gate:
    """Lets requests in while there are fewer than a limit, until they are answered or their client has left."""

    def __init__(self, most: int):
        self.most = most
        self.inside = 0
        self.answered = 0
        self.started = time.time()

    async def answer(self, request: Request, handle: Callable[[dict, str], Awaitable[Response]]) -> Response:
        try:
            body = await read_body(request)
        except ClientDisconnect:
            return Response(status_code=GONE)
        if self.inside >= self.most:
            message = f"{self.inside} requests are running or waiting; try again later"
            raise HTTPException(429, message, {"Retry-After": "1"})
        self.inside += 1
        request_id = request.headers.get("x-request-id") or f"llmkernel-{uuid.uuid4().hex}"
        try:
            response = await while_connected(request, self._begin(handle(body, request_id)))
        except BaseException:
            self.inside -= 1
            raise
        if not isinstance(response, Events):
            self._leave()
        return response

    async def _begin(self, work: Awaitable[Response]) -> Response:
        """An answer, or events of which there is a first: what has not begun could not be given up either."""
        response = await work
        if not isinstance(response, StreamingResponse):
            return response
        events: Any = response.body_iterator
        return Events(await anext(events), events, self._leave)

    def _leave(self) -> None:
        self.inside -= 1
        self.answered += 1


async def read_body(request: Request) -> dict[str, Any]:
    text = bytearray()
    async for piece in request.stream():
        text += piece
        if len(text) > MOST_BYTES:
            raise HTTPException(413, f"the body has more than {MOST_BYTES} bytes")
    try:
        body = json.loads(text)
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # neither a tokenizer nor an answer would take it
        raise HTTPException(400, "the body has half a character (\\ud800 to \\udfff alone); send both halves") from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is no JSON ({error})") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return body


async def while_connected(request: Request, work: Awaitable[Response]) -> Response:
    """What the work gives; it is cancelled when the client closes the connection."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=GONE)
        return task.result()
    finally:
        leaving.cancel()
        task.cancel()


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """Server-sent events up to OpenAI's end mark; `leave` is called however they end."""

    def __init__(self, first: str, rest: Any, leave: Callable[[], None]):
        super().__init__(self._all(first), media_type="text/event-stream")
        self.rest = rest
        self.leave = leave

    async def _all(self, first: str) -> AsyncIterator[str]:
        yield first
        async for event in self.rest:
            yield event
        yield "data: [DONE]\n\n"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()
            await self.rest.aclose()


async def as_openai_has_them(events: Any, usage_apart: bool) -> AsyncIterator[str]:
    """transformers' events, with errors as objects, and where asked for the usage in an event of its own, the last."""
    try:
        async for together in events:
            for event in together.split("\n\n")[:-1]:
                for data in _as_openai_has_it(event, usage_apart):
                    yield f"{data}\n\n"
    finally:
        await events.aclose()  # which cancels the request, if it still runs


def _as_openai_has_it(event: str, usage_apart: bool) -> list[str]:
    # Within a text of the model these quotes would have backslashes.
    failed, ending = '"error":' in event, usage_apart and '"usage":' in event
    if not (failed or ending):
        return [event]
    chunk = json.loads(event.removeprefix("data: "))
    if failed:
        return [f"data: {json.dumps(error_body(500, chunk['error']))}"]
    usage = {**chunk, "choices": []}
    del chunk["usage"]
    return [f"data: {json.dumps(chunk)}", f"data: {json.dumps(usage)}"]


class Models(ModelManager):
    """transformers' model manager, as its handlers ask it, over the engine."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.force_model = None

    def named(self, name: str | None) -> str:
        """The name of a served model; without one, of the only one that is no adapter."""
        models = [served.name for served in self.engine.served.values() if served.base is None]
        if name is None and len(models) == 1:
            return models[0]
        if name not in self.engine.served:
            raise HTTPException(404, f"model={name!r}: is not served; there are {', '.join(self.engine.served)}")
        return name


class State(GenerationState):
    """Hands out, for every model, what runs its requests."""

    def __init__(self, models: Models):
        super().__init__()
        self.models = models

    def get_manager(self, model_id: str, use_cb: bool = False) -> "EngineManager":
        return EngineManager(self.models.engine, self.models.engine.served[model_id])


class _Handler:
    """What both handlers do otherwise than transformers': check first, load apart, take settings as OpenAI has them."""

    def __init__(self, models: Models, most_tokens: int):
        super().__init__(models, State(models))  # type: ignore[call-arg]
        self.models = models
        self.most_tokens = most_tokens

    async def handle_request(self, body: dict, request_id: str) -> Any:
        try:
            self._validate_request(body)
            body["model"] = self.models.named(body.get("model"))
            served = await self._loaded(body["model"])
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        try:
            self._check_template(served, body)
            response = await super().handle_request(body, request_id)  # type: ignore[misc]
        except (ValueError, TypeError, TemplateError) as error:  # of a template that takes no such messages, too
            raise HTTPException(400, " ".join(str(error).split())) from None
        finally:
            self.models.engine.release(served)
        if isinstance(response, StreamingResponse):
            usage_apart = body.get("stream_options", {}).get("include_usage", False)
            response.body_iterator = as_openai_has_them(response.body_iterator, usage_apart)
        return response

    async def _loaded(self, name: str) -> Served:
        future = self.models.engine.use(name)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._give_back)
            raise
        except Exception as error:
            raise HTTPException(503, f"model={name!r}: does not load: {' '.join(str(error).split())}") from None

    def _give_back(self, future: Any) -> None:
        if not future.cancelled() and future.exception() is None:
            self.models.engine.release(future.result())

    def _validate_request(self, body: dict) -> None:
        raise NotImplementedError

    def _check_template(self, served: Served, body: dict) -> None: ...

    def _resolve_model(self, body: dict) -> tuple[str, Any, Any]:
        served = self.models.engine.served[body["model"]]
        return served.name, served.network, served.tokenizer

    def _build_generation_config(self, body: dict, model_generation_config: Any, use_cb: bool = False) -> Any:
        asked = {name: value for name, value in body.items() if name not in ("seed", "stop")}
        config = super()._build_generation_config(asked, model_generation_config, use_cb)  # type: ignore[misc]
        if (temperature := body.get("temperature")) is not None:
            config.update(**sampling_options(temperature, body.get("top_p", 1.0) if temperature else 1.0))
        if body.get("max_completion_tokens") is None and body.get("max_tokens") is None:
            config.max_new_tokens = self.most_tokens
        # Carried to the request; `generate()` has no such settings.
        stop = body.get("stop") or []
        config.seed, config.stop = body.get("seed"), [stop] if isinstance(stop, str) else stop
        return config


class ChatHandler(_Handler, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    def _validate_request(self, body: dict) -> None:
        check_fields(body, self.most_tokens)
        check_chat(body)

    async def _non_streaming(
        self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any, gen_config: Any, **others: Any
    ) -> JSONResponse:
        """A message is parsed from all tokens, where the model has a template for it, and is cut here."""
        response = await super()._non_streaming(request_id, model, processor, model_id, inputs, gen_config, **others)
        answer = json.loads(bytes(response.body))
        message = answer["choices"][0]["message"]
        message["content"] = cut(message["content"], gen_config.stop)
        return JSONResponse(answer)

    def _check_template(self, served: Served, body: dict) -> None:
        if getattr(served.tokenizer, "chat_template", None) is None:
            raise ValueError(f"model={served.name!r}: has no chat template; use /v1/completions")
        if uses_tools(body) and not _has_tools(served):
            raise ValueError(
                f"tools: model={served.name!r} has no templates that show it tools and read its calls; leave them out"
            )


def _has_tools(served: Served) -> bool:
    """Whether the chat template shows a model tools, and the response template reads its calls of them."""
    asked = [{"role": "user", "content": ""}]
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    without, shown = (served.tokenizer.apply_chat_template(asked, tools, tokenize=False) for tools in (None, [tool]))
    return shown != without and get_response_template(served.tokenizer, served.network) is not None


class TextHandler(_Handler, CompletionHandler):
    """`/v1/completions`."""

    def _validate_request(self, body: dict) -> None:
        check_fields(body, self.most_tokens)
        check_completion(body)


class EngineManager(BaseGenerateManager):
    """Runs the requests of a model in the engine's batches."""

    def __init__(self, engine: Engine, served: Served):
        self.engine = engine
        self.served = served

    def stop(self) -> None: ...

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> "tuple[asyncio.Queue, TextStreamer]":
        streamer, _ = self._submit(model, processor, inputs, gen_config, response_parser)
        return streamer.queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        streamer, sequence = self._submit(model, processor, inputs, gen_config, None)
        try:
            while (item := await streamer.queue.get()) is not None:
                if isinstance(item, _StreamError):
                    raise HTTPException(500, "the model failed: " + json.loads(f'"{item.msg}"'))
        finally:
            streamer.cancel()  # if it still runs, whoever asked has left
        made = sequence.ids[sequence.prompt_tokens :]
        text = processor.decode(made, skip_special_tokens=True)
        return cut(text, gen_config.stop), sequence.prompt_tokens, made

    def _submit(
        self, model: Any, tokenizer: Any, inputs: Any, config: Any, parser: Any
    ) -> "tuple[TextStreamer, Sequence]":
        """Raises `ValueError` for a prompt without tokens, or one that leaves no room in the context."""
        ids = inputs["input_ids"]
        if not ids.numel():
            raise ValueError("the prompt has no tokens")
        config.max_new_tokens = min(config.max_new_tokens, room_after(model, ids.shape[1]))
        check_tokens(model, ids)
        streamer = TextStreamer(tokenizer._tokenizer, config, parser)
        sequence = Sequence(model, ids[0].tolist(), config, streamer, config.seed)
        streamer.sequence = sequence
        self.engine.submit(self.served, sequence)
        return streamer, sequence


class TextStreamer(DirectStreamer):
    """transformers' streamer as a sink of the engine: tokens to text on the server's queue, up to a stop string."""

    sequence: Sequence

    def __init__(self, tokenizer: Any, config: Any, parser: Any):
        self.config = config
        self.stop = StopStrings(config.stop)
        self.queue: asyncio.Queue = asyncio.Queue()
        super().__init__(tokenizer, asyncio.get_running_loop(), self.queue, parser)
        self._first = False  # the prompt is not put

    @property
    def ended(self) -> bool:
        return self._cancelled.is_set() or self.stop.found

    def put(self, value: torch.Tensor) -> None:
        if not self.ended:
            super().put(value)

    def end(self) -> None:
        if self.stop.found or self.sequence.is_ended():
            self.config.max_new_tokens = None  # a text of that many tokens would be said to have been cut
        super().end()

    def fail(self, error: Exception) -> None:
        text = " ".join(str(error).split()) or type(error).__name__
        super()._enqueue(_StreamError(json.dumps(text)[1:-1]))  # it is put between quotes

    def _enqueue(self, item: Any) -> None:
        if item is None and (rest := self.stop.rest()):
            super()._enqueue(rest)
        elif type(item) is str:  # text of the answer, and not of its reasoning
            item = self.stop.feed(item)
        if item != "":
            super()._enqueue(item)
