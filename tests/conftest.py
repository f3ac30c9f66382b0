"""The surroundings of every test: one thread a worker, caches that last for the run, clean child processes.

Set before anything imports torch or huggingface_hub, which read the environment once.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STARTUP = ROOT / "startup"

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Equality to the bit is stated of torch; tests/kernels turns the native kernels on.
os.environ["LLMKERNEL_KERNELS"] = "off"
os.environ["LLMKERNEL_PATHS"] = "native"  # where they are on, whatever another path would take here
# Dynamic modules, tokens and downloads of one worker: neither the user's own nor another worker's.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_llmkernel-tests-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# As where the package is not installed, whatever this environment holds.
WITHOUT_PACKAGE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_llmkernel":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
"""
# As where the package's .pth file stands in site-packages.
WITH_PTH = f"""
import site, sys
sys.path.insert(0, {str(ROOT)!r})
loaded_before = set(sys.modules)
site.addsitedir({str(STARTUP)!r})
"""


@pytest.fixture
def run_python(tmp_path):
    """Runs code in a new process, `package` installed or not, and returns its standard output.

    The code sees no terminal, so that a question to the user ends it with an error.
    """

    def run(code: str, *arguments: str, package: bool = True, **environment: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-c", (WITH_PTH if package else WITHOUT_PACKAGE) + code, *arguments],
            cwd=tmp_path,
            env={**os.environ, **({} if package else {"LLMKERNEL_REGISTRATION": "off"}), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        return ended.stdout

    return run


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Folder of a random two-layer causal model with a word tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    words = ["<unk>", "<eos>", "user", "assistant", *(f"w{index}" for index in range(60))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LLMKernelConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LLMKernelForCausalLM(config).save_pretrained(folder)
    return folder
