"""llama.cpp as a foreign reader, by the package xllamacpp, in a process of its own: a file that it aborts on ends no
test run."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="the package xllamacpp, llama.cpp's own code, is not installed: it has wheels for Linux, macOS and Windows",
)
SCRIPT = """
import json, sys, time, urllib.request
import xllamacpp
path, requests = sys.argv[1], json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path = path
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(parameters)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
def post(name, body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/{name}", json.dumps(body).encode(), headers)
    for _ in range(50):  # its endpoints come a moment after its address
        try:
            return json.load(opener.open(request, timeout=120))
        except urllib.error.HTTPError as error:
            if error.code not in (404, 503):
                raise
        time.sleep(0.1)
print("ANSWERS" + json.dumps([post(*request) for request in requests]), flush=True)
"""


def ask(path: Path, requests: list[tuple[str, dict]]) -> list[dict]:
    """Answers of llama.cpp's server to requests, `(its endpoint, the body)`."""
    command = [sys.executable, "-c", SCRIPT, str(path)]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if "ANSWERS" in line]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].partition("ANSWERS")[2])


def next_tokens(path: Path, prompts: list[list[int]]) -> list[tuple[int, float]]:
    """The greedy token after each prompt of ids, and the logarithm of its probability."""
    body = {"n_predict": 1, "temperature": 0, "n_probs": 1, "ignore_eos": True, "return_tokens": True}
    answers = ask(path, [("completion", {"prompt": prompt, **body}) for prompt in prompts])
    return [(answer["tokens"][0], answer["completion_probabilities"][0]["logprob"]) for answer in answers]


def assert_llama_cpp_agrees(model: torch.nn.Module, path: Path, tolerance: float) -> None:
    """The same top-1 token after every prompt, and the logarithm of its probability within a tolerance.

    llama.cpp rounds activations to 8 bits where weights are integers, so prompts are those after which the model
    prefers one token by more than the tolerance; one of ASCII, for half a character has no probability there.
    """
    prompts = torch.randint(3, model.config.vocab_size, (512, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        best = model(prompts).logits[:, -1].float().log_softmax(-1).topk(2)
    tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
    readable = torch.tensor([token.isascii() and not token.startswith("<") for token in tokens])
    clear = (best.values[:, 0] - best.values[:, 1] > 2 * tolerance) & readable[best.indices[:, 0]]
    chosen = clear.nonzero().flatten()[:6].tolist()
    assert len(chosen) == 6
    answers = next_tokens(path, prompts[chosen].tolist())
    assert [token for token, _ in answers] == best.indices[chosen, 0].tolist()
    found = torch.tensor([logprob for _, logprob in answers])
    assert (found - best.values[chosen, 0]).abs().max() <= tolerance
