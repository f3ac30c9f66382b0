"""A server on a loopback port: the tokens of `generate`, limits, and what becomes of clients that leave."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection

import pytest
import requests
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_llmkernel import cli
from hf_llmkernel.generate import engine as engine_module
from hf_llmkernel.generate.batch import Batch, Request
from hf_llmkernel.generate.command import generate
from hf_llmkernel.generate.engine import Engine, Served
from hf_llmkernel.kernels import library

uvicorn = pytest.importorskip("uvicorn")
MODEL = "tiny"


class Running:
    """A server in a thread of this process."""

    def __init__(self, engine: Engine, most_tokens: int = 100, most_requests: int = 4):
        from hf_llmkernel.generate.endpoints import build_app

        self.engine = engine
        self.app = build_app(engine, most_tokens, most_requests)
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.started)
        self.address = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def post(self, path: str, **body):
        return requests.post(f"{self.address}/v1/{path}", json={"temperature": 0, **body}, timeout=30)

    def get(self, path: str):
        return requests.get(f"{self.address}{path}", timeout=30).json()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.engine.stop()


def until(true, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def events(response) -> list:
    lines = [line.removeprefix("data: ") for line in response.iter_lines(decode_unicode=True) if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def endless(tiny_checkpoint, tmp_path_factory):
    """The tiny model, which never ends a text, and a copy of another name."""
    folders = []
    for name in (MODEL, "twin", "third"):
        folder = tmp_path_factory.mktemp("served") / name
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="module")
def server(endless):
    running = Running(Engine([Served(MODEL, endless[0])], most=2))
    yield running
    running.stop()


@pytest.fixture
def slow(server, monkeypatch):
    """Every forward takes a little longer, so that a request lasts."""
    forward = Batch._forward

    def wait(self, *arguments):
        time.sleep(0.02)
        return forward(self, *arguments)

    monkeypatch.setattr(Batch, "_forward", wait)
    yield
    until(lambda: server.engine.counts() == (0, 0))


def test_models_are_listed(server):
    assert [model["id"] for model in server.get("/v1/models")["data"]] == [MODEL]


def test_a_greedy_completion_is_that_of_generate(server, endless, capsys):
    expected = generate(endless[0], "w1 w2 w3", max_new_tokens=12, chat=False)["text"]
    answer = server.post("completions", model=MODEL, prompt="w1 w2 w3", max_tokens=12).json()
    assert answer["choices"][0]["text"] == expected
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_a_greedy_answer_is_that_of_generate_streamed_or_not(server, endless, capsys):
    expected = generate(endless[0], "w1 w2", max_new_tokens=12)["text"]
    body = {"messages": [{"role": "user", "content": "w1 w2"}], "max_completion_tokens": 12}
    message = server.post("chat/completions", **body).json()["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", expected)
    chunks = events(server.post("chat/completions", **body, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks).split() == expected.split()
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 12


def test_a_sample_is_that_of_generate(server, endless, capsys):
    expected = [generate(endless[0], "w1", 12, 2.0, seed=seed, chat=False)["text"] for seed in (3, 4)]
    body = {"prompt": "w1", "max_tokens": 12, "temperature": 2.0}
    texts = [server.post("completions", **body, seed=seed).json()["choices"][0]["text"] for seed in (3, 4)]
    assert texts == expected and texts[0] != texts[1]


def test_requests_run_together_and_each_is_as_if_alone(server):
    def ask(index):
        prompt = " ".join(f"w{index + step}" for step in range(index + 1))
        return server.post("completions", prompt=prompt, max_tokens=10 + index).json()["choices"][0]["text"]

    alone = [ask(index) for index in range(4)]
    together = [None] * 4
    threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, ask(i))) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert together == alone


def test_a_text_ends_before_a_stop_string(server):
    text = server.post("completions", prompt="w1 w2", max_tokens=12).json()["choices"][0]["text"]
    words = text.split()
    stop = words[5]
    expected = words[: words.index(stop)]
    answer = server.post("completions", prompt="w1 w2", max_tokens=12, stop=[stop, "nowhere"]).json()
    assert answer["choices"][0]["text"].split() == expected
    assert answer["choices"][0]["finish_reason"] == "stop"
    chunks = events(server.post("completions", prompt="w1 w2", max_tokens=12, stop=stop, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).split() == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_text_ends_with_the_context(server):
    answer = server.post("completions", prompt="w1 " * 120, max_tokens=50).json()
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["finish_reason"] == "length"


MESSAGE = {"role": "user", "content": "w1"}
CHAT = {"messages": [MESSAGE]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
NO_TOOLS = "tools: model='tiny' has no templates that show it tools and read its calls; leave them out"
CHAT_TEXT = '"messages": [{"role": "user", "content": "%s"}]'
CALL = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}]}


@pytest.mark.parametrize(
    ("status", "path", "body", "message"),
    [
        (404, "completions", {"model": "absent", "prompt": "w1"}, "model='absent': is not served; there are tiny"),
        (404, "embeddings", {"input": "w1"}, "/v1/embeddings: is not served"),
        (400, "completions", {"prompt": "w1 " * 128}, "the prompt has 128 tokens, the model's context ends at 128"),
        (400, "completions", {"prompt": ""}, "the prompt has no tokens"),
        (400, "completions", {}, "prompt: is missing"),
        (400, "completions", {"prompt": [1, 2]}, "prompt=[1, 2]: must be a text"),
        (400, "completions", {"prompt": "w1", "max_tokens": 101}, "this server gives at most 100"),
        (400, "completions", {"prompt": "w1", "max_tokens": 0}, "max_tokens=0: must be a whole number above 0"),
        (400, "completions", {"prompt": "w1", "temperature": "hot"}, "temperature='hot': must be a number"),
        (400, "completions", {"prompt": "w1", "n": 2}, "n=2: is not served"),
        (400, "completions", {"prompt": "w1", "colour": 1}, "colour=1: is not served"),
        (400, "chat/completions", {"prompt": "w1"}, "messages: is missing"),
        (400, "chat/completions", {"messages": ["w1"]}, "messages[0]: must be an object with a role"),
        (400, "chat/completions", {"messages": [{"content": "w1"}]}, "messages[0]: must be an object with a role"),
        (400, "chat/completions", {"messages": [{**MESSAGE, "role": "w1"}]}, "messages[0].role='w1': must be"),
        (400, "chat/completions", {"messages": [{**MESSAGE, "role": [1]}]}, "a role, one of system, developer, user,"),
        (400, "chat/completions", {"messages": [{**MESSAGE, "tool_calls": 5}]}, "the text of a JSON object"),
        (400, "chat/completions", {"messages": [MESSAGE, {**MESSAGE, "role": "tool"}]}, NO_TOOLS),
        (400, "chat/completions", {**CHAT, "tools": [TOOL]}, NO_TOOLS),
        (400, "chat/completions", {**CHAT, "tools": [{"function": {}}]}, "must be a list of objects, each of a"),
        (400, "chat/completions", {**CHAT, "tools": "w1"}, "tools='w1': must be a list"),
        (400, "chat/completions", {**CHAT, "chat_template_kwargs": {"messages": []}}, "messages: is not served"),
        (400, "chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content: must be"),
        (400, "chat/completions", {**CHAT, "stop": ""}, "stop='': must be a text that is not empty"),
        (400, "chat/completions", {**CHAT, "stream_options": {"every": 2}}, "must be an object of include_usage"),
        (400, "chat/completions", {**CHAT, "parallel_tool_calls": False}, "parallel_tool_calls=False: is not served"),
        (400, "chat/completions", {**CHAT, "chat_template_kwargs": {"tokenize": False}}, "tokenize: is not served"),
        (400, "chat/completions", {"messages": [{**CHAT["messages"][0], **CALL}]}, "the text of a JSON object"),
        (400, "completions", {"prompt": "w1", "logprobs": 0}, "logprobs=0: is not served"),
        (400, "completions", {"prompt": "w1", "n": True}, "n=True: is not served"),
        (400, "completions", {"prompt": "w1", "max_tokens": -1}, "max_tokens=-1: must be a whole number above 0"),
    ],
)
def test_bad_requests(server, status, path, body, message):
    answer = server.post(path, **body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, status)
    assert server.get("/health")["status"] == "ok"


@pytest.mark.parametrize("body", ["{", "[1]", "\xff", "[" * 100_000])
def test_what_is_no_json_object_is_refused(server, body):
    answer = requests.post(f"{server.address}/v1/completions", data=body.encode("latin-1"), timeout=30)
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models/tiny", "GET"),
        ("HEAD", "/v1/models", "GET"),
    ],
)
def test_other_methods_are_405(server, method, path, allowed):
    answer = requests.request(method, server.address + path, timeout=30)
    assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
    assert answer.text == "" if method == "HEAD" else answer.json()["error"]["code"] == 405


def test_a_body_beyond_the_limit_is_413(server, monkeypatch):
    monkeypatch.setattr("hf_llmkernel.generate.endpoints.MOST_BYTES", 100)
    assert server.post("completions", prompt="w1", max_tokens=1).status_code == 200
    answer = server.post("completions", prompt="w1 " * 50)
    assert answer.status_code == 413 and "more than 100 bytes" in answer.json()["error"]["message"]


def test_one_model_is_described(server):
    assert server.get(f"/v1/models/{MODEL}") == server.get("/v1/models")["data"][0]
    assert requests.get(f"{server.address}/v1/models/absent", timeout=30).status_code == 404


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_usage_is_an_event_of_its_own_where_asked_for(server, path):
    body = {"max_tokens": 4, **(CHAT if path.startswith("chat") else {"prompt": "w1"})}
    asked = events(server.post(path, **body, stream=True, stream_options={"include_usage": True}))
    assert asked[-1]["choices"] == [] and asked[-1]["usage"]["completion_tokens"] == 4
    assert asked[-2]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in chunk for chunk in asked[:-1])
    plain = events(server.post(path, **body, stream=True, stream_options={"include_usage": False}))
    assert len(plain) == len(asked) - 1 and plain[-1]["usage"] == asked[-1]["usage"]


def test_openais_client(server):
    """The real one: lists, answers, streams, and its own exceptions for errors."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        answer = client.chat.completions.create(model=MODEL, messages=CHAT["messages"], max_tokens=5, temperature=0)
        stream = client.chat.completions.create(
            model=MODEL, messages=CHAT["messages"], max_tokens=5, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces).split() == answer.choices[0].message.content.split()
        with pytest.raises(openai.NotFoundError, match="model='absent': is not served"):
            client.completions.create(model="absent", prompt="w1")
        with pytest.raises(openai.BadRequestError, match="n=2: is not served"):
            client.completions.create(model=MODEL, prompt="w1", n=2)


def test_a_text_that_ends_with_its_last_token_was_not_cut(server, monkeypatch):
    body = {"prompt": "w1 w2", "max_tokens": 6}
    words = server.post("completions", **body).json()["choices"][0]["text"].split()
    assert words.index(words[5]) == 5
    for _ in ("at a stop string", "at the end token"):
        assert server.post("completions", **body, stop=words[5]).json()["choices"][0]["finish_reason"] == "stop"
        chunks = events(server.post("completions", **body, stop=words[5], stream=True))
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        end = server.engine.served[MODEL].tokenizer.convert_tokens_to_ids(words[5])
        monkeypatch.setattr(server.engine.served[MODEL].network.generation_config, "eos_token_id", end)
    answer = server.post("completions", **body).json()
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 6


def test_a_parsed_message_ends_before_a_stop_string(server, monkeypatch):
    """Streamed or not, of a model that says how its answers are to be read."""
    server.post("completions", prompt="w1", max_tokens=1)  # the model is there
    fields = {"content": {"content": "text"}}
    template = {"defaults": {"role": "assistant"}, "start_anchor": "assistant", "fields": fields}
    monkeypatch.setattr(server.engine.served[MODEL].tokenizer, "response_template", template, raising=False)
    body = {**CHAT, "max_tokens": 12}
    words = server.post("chat/completions", **body).json()["choices"][0]["message"]["content"].split()
    expected = words[: words.index(words[4])]
    message = server.post("chat/completions", **body, stop=words[4]).json()["choices"][0]["message"]
    assert message["content"].split() == expected
    chunks = events(server.post("chat/completions", **body, stop=words[4], stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks).split() == expected


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-12, 1e-4, 2])
def test_any_temperature_is_served(server, temperature):
    answer = server.post("completions", prompt="w1 w2", max_tokens=4, temperature=temperature)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("text", ["\\ud800", "w1 \\u0000 w2", "\\ufffe"])
def test_odd_characters(server, text):
    """What no tokenizer takes is 400, and nothing breaks."""
    for path, body in (("completions", '"prompt": "%s"'), ("chat/completions", CHAT_TEXT)):
        data = '{"max_tokens": 2, "temperature": 0, %s}' % (body % text)
        answer = requests.post(f"{server.address}/v1/{path}", data=data, timeout=30)
        assert answer.status_code == (400 if "d800" in text else 200), answer.text


@pytest.mark.parametrize("body", ['{"prompt": "w1", "\\ud800": 1}', '{"prompt": "w1", "stop": ["\\udfff"]}'])
def test_half_a_character_anywhere_is_refused(server, body):
    answer = requests.post(f"{server.address}/v1/completions", data=body, timeout=30)
    assert answer.status_code == 400 and "half a character" in answer.json()["error"]["message"]


def test_tools_are_served_where_templates_show_them_and_read_the_calls(server, monkeypatch):
    server.post("completions", prompt="w1", max_tokens=1)  # the model is there
    tokenizer = server.engine.served[MODEL].tokenizer
    shows = tokenizer.chat_template + "{% if tools %} w9{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", shows)
    assert NO_TOOLS in server.post("chat/completions", **CHAT, tools=[TOOL]).text  # what it calls is not read
    template = {"defaults": {"role": "assistant"}, "start_anchor": "w9", "fields": {"content": {"content": "text"}}}
    monkeypatch.setattr(tokenizer, "response_template", template, raising=False)
    answer = server.post("chat/completions", **CHAT, tools=[TOOL], max_tokens=2)
    assert answer.json()["usage"]["prompt_tokens"] == 4, answer.text


def test_a_developer_is_the_system_and_no_tool_calls_are_none(server):
    def answer(*messages):
        response = server.post("chat/completions", messages=[*messages, MESSAGE], max_tokens=3)
        return response.json()["choices"][0]["message"]["content"]

    said = {"role": "assistant", "content": "w3"}
    assert answer({"role": "developer", "content": "w2"}) == answer({"role": "system", "content": "w2"})
    assert answer({**said, "tool_calls": None}) == answer({**said, "tool_calls": []}) == answer(said)


def test_fields_without_effect_are_taken(server):
    extra = {"n": 1, "user": "me", "stream_options": {"include_usage": True}, "presence_penalty": 0, "logprobs": None}
    assert server.post("chat/completions", **CHAT, max_tokens=2, **extra).status_code == 200


def test_a_client_that_leaves_frees_its_request(server, slow, monkeypatch):
    """Both that run are given up, streamed or not, and so is one that waits."""
    made = []
    monkeypatch.setattr(Request, "is_full", lambda self: made.append(1) or False)  # they would never end
    clients = [asking(server, stream) for stream in (True, False, False)]
    until(lambda: server.engine.counts() == (2, 1))
    for client in clients:
        client.close()
    until(lambda: server.engine.counts() == (0, 0) and server.app.state.gate.inside == 0)
    assert made and server.engine.served[MODEL].users == 0


def asking(server, stream: bool) -> HTTPConnection:
    """A connection on which a request was sent."""
    client = HTTPConnection(server.address.removeprefix("http://"))
    body = json.dumps({"prompt": "w1", "max_tokens": 100, "temperature": 0, "stream": stream})
    client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return client


def test_a_full_queue_is_429(server, slow):
    body = {"prompt": "w1", "max_tokens": 30}
    threads = [threading.Thread(target=lambda: server.post("completions", **body)) for _ in range(4)]
    [thread.start() for thread in threads]
    until(lambda: server.app.state.gate.inside == 4)
    refused = server.post("completions", **body)
    assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    [thread.join() for thread in threads]
    assert server.post("completions", prompt="w1", max_tokens=1).status_code == 200


def test_a_model_that_fails_is_500_and_the_next_request_is_served(server, monkeypatch):
    with monkeypatch.context() as patched:

        def fail(self):
            raise RuntimeError('a "quoted"\npath\\x')

        patched.setattr(Batch, "_decode", fail)
        answer = server.post("completions", prompt="w1", max_tokens=4)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == 'the model failed: a "quoted" path\\x'
        error = events(server.post("completions", prompt="w1", max_tokens=4, stream=True))[-1]["error"]
        assert (error["message"], error["type"]) == ('a "quoted" path\\x', "server_error")
    assert server.post("completions", prompt="w1", max_tokens=4).status_code == 200


@pytest.mark.parametrize("kernels", ["off", "on"])
def test_a_model_takes_its_tensors_and_what_is_laid_out_of_them(tiny_checkpoint, tmp_path, kernels, monkeypatch):
    """The same whatever else the process takes or gives back meanwhile; beyond the budget it is refused."""
    if kernels == "on" and library.NATIVE is None:
        pytest.skip("the native library is not built: there is no compiler")
    monkeypatch.setenv("LLMKERNEL_KERNELS", kernels)
    forms = {"q_proj": {"bits": 8, "group_size": 32}, "up_proj": {"rank": 8, "b": {"bits": 4}}}
    config = AutoConfig.from_pretrained(tiny_checkpoint, linear_forms=forms)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    served = Served(MODEL, str(tmp_path))
    served.load("auto", 1)
    packed = [module for module in served.network.modules() if hasattr(module, "kept_tensor")]
    laid_out = [module.kept_tensor().nbytes for module in packed]
    stored = [tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values()]
    assert len(laid_out) == 4 and served.bytes == sum(stored) + sum(laid_out)
    taken, others = served.bytes, [torch.ones(2**20)]
    for budget, error in ((taken, None), (taken - 1, "memory=.* kB: tiny takes .* once it is laid out; raise it, or")):
        engine = Engine([Served(MODEL, str(tmp_path))], budget=budget)
        del others[:]  # what is given back is not taken off
        with pytest.raises(ValueError, match=error) if error else contextlib.nullcontext():
            assert engine.use(MODEL).result(30).bytes == taken
        engine.stop()


def test_models_share_a_budget_and_the_one_unused_for_longest_goes(endless, capsys):
    served = [Served(name, folder) for name, folder in zip((MODEL, "twin", "third"), endless, strict=True)]
    running = Running(Engine(served, budget=2 * served[0].bytes + 100))
    try:
        assert running.get("/health")["loaded"] == []
        for name, loaded in (
            (MODEL, [MODEL]),
            ("twin", [MODEL, "twin"]),
            (MODEL, [MODEL, "twin"]),
            ("third", [MODEL, "third"]),
            ("twin", ["twin", "third"]),
        ):
            assert running.post("completions", model=name, prompt="w1", max_tokens=2).json()["model"] == name
            assert running.get("/health")["loaded"] == loaded
        assert running.post("completions", prompt="w1", max_tokens=2).status_code == 404  # which of them?
        assert "twin: let go" in capsys.readouterr().err
    finally:
        running.stop()


def test_a_model_in_use_stays_and_others_wait_for_their_turn(endless):
    served = [Served(name, folder) for name, folder in zip((MODEL, "twin"), endless, strict=False)]
    engine = Engine(served, budget=served[0].bytes + 100)
    first = engine.use(MODEL).result(30)
    second, third = engine.use("twin"), engine.use(MODEL)
    time.sleep(0.2)
    assert not second.done() and not third.done() and engine.loaded() == [MODEL]
    engine.release(first)
    assert second.result(30).name == "twin" and engine.loaded() == ["twin"]
    assert third.cancel()
    engine.release(served[1])
    engine.stop()


def test_a_model_that_does_not_load_is_503(endless, tmp_path, monkeypatch):
    engine = Engine([Served(MODEL, endless[0])])
    monkeypatch.setattr(engine_module, "load", lambda *_: (_ for _ in ()).throw(OSError("torn file")))
    running = Running(engine)
    try:
        answer = running.post("completions", prompt="w1")
        assert answer.status_code == 503 and "does not load: torn file" in answer.json()["error"]["message"]
        assert running.app.state.gate.inside == 0
    finally:
        running.stop()


def test_a_chat_needs_a_template(tiny_checkpoint, tmp_path):
    for loader in (AutoModelForCausalLM, AutoTokenizer):
        loader.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    running = Running(Engine([Served(MODEL, str(tmp_path))]))
    try:
        answer = running.post("chat/completions", **CHAT)
        assert answer.status_code == 400 and "has no chat template" in answer.json()["error"]["message"]
    finally:
        running.stop()


def test_sigterm_lets_a_running_request_end(endless):
    """The program itself: the answer under way comes whole, the next client is refused, the exit code is 0."""
    command = [sys.executable, "-m", "hf_llmkernel", "serve", endless[0], "--port", "0", "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        address = until_listening(process)
        body = {"prompt": "w1", "max_tokens": 120, "stream": True}
        streamed = requests.post(f"{address}/completions", json=body, stream=True, timeout=60)
        lines = streamed.iter_lines(decode_unicode=True)
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"completion_tokens":120' in rest[-2].replace(" ", "")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out)["requests"] == 1
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{address}/models", timeout=5)
    finally:
        process.kill()
        process.communicate()


def test_a_second_interruption_does_not_wait(endless):
    """For a request whose body never comes whole; no traceback, and the exit code is 0."""
    command = [sys.executable, "-m", "hf_llmkernel", "serve", endless[0], "--port", "0", "--drain", "600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        host, port = until_listening(process).removeprefix("http://").removesuffix("/v1").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: tiny\r\nContent-Length: 9\r\n\r\n{")
            for _ in range(2):
                time.sleep(0.5)
                assert process.poll() is None
                process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == ""
    finally:
        process.kill()
        process.communicate()


def until_listening(process) -> str:
    for line in process.stderr:
        if found := re.search(r"(http://\S+) serves tiny", line):
            return found[1]
    pytest.fail("the server has ended")


def test_bad_usage_is_one_line(endless, capfd):
    for arguments, message in (
        ([endless[0], "--memory", "1KB"], "error: memory=1.00 kB: tiny alone takes"),
        ([endless[0], "--dtype", "int3"], "error: dtype=int3: must be one of auto"),
        (["/absent"], "error: model='/absent': is no folder of a checkpoint"),
        ([endless[0], "--host", "203.0.113.7"], "error: port=8000: cannot listen at 203.0.113.7"),
    ):
        assert cli.main(["serve", *arguments]) == 2
        assert capfd.readouterr().err.splitlines()[-1].startswith(message)


def test_without_the_extra_it_is_named(endless, capfd, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert cli.main(["serve", endless[0]]) == 2
    assert "pip install 'hf_llmkernel[serving]'" in capfd.readouterr().err


def test_torch_is_left_with_its_threads(server):
    assert torch.get_num_threads() >= 1
