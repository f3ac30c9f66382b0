"""Save, load in a clean process, same logits bit for bit: every form, with and without the package.

One fixture writes every folder and starts two processes over all of them: one that has the package, and one that has
not and loads the folders as remote code. The tests compare what came back.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_llmkernel.model.modeling_llm_kernel as modeling
from hf_llmkernel.model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from tests.model.clean_process_worker import compute

# One worker of a parallel run takes the whole file, so that its folders are written once.
pytestmark = pytest.mark.xdist_group("clean_process")

WORKER = Path(__file__).with_name("clean_process_worker.py")
ROOT = Path(__file__).parents[2]
FormOfShape = Callable[[int, int], dict]  # a form by out_features and in_features
MODES = ("with package", "without package")
CLASSES = {
    "AutoModel": modeling.LLMKernelModel,
    "AutoModelForCausalLM": modeling.LLMKernelForCausalLM,
    "AutoModelForSequenceClassification": modeling.LLMKernelForSequenceClassification,
    "AutoModelForTokenClassification": modeling.LLMKernelForTokenClassification,
    "AutoModelForQuestionAnswering": modeling.LLMKernelForQuestionAnswering,
}
SPARSE = {"bitmask": {"sparsity": "bitmask"}, "2:4": {"sparsity": "2:4"}}
INTEGER = {
    "int8": {"bits": 8},
    "int8 asymmetric": {"bits": 8, "group_size": 16, "symmetric": False},
    "int4": {"bits": 4, "group_size": 16, "scale_dtype": "float32"},
    "int4 asymmetric": {"bits": 4, "group_size": 8, "symmetric": False, "zero_point_dtype": "float16"},
}
PACKED = {
    **SPARSE,
    **INTEGER,
    **{f"{sparse} + {integer}": SPARSE[sparse] | INTEGER[integer] for sparse in SPARSE for integer in INTEGER},
}


def sized(form: dict, out_features: int, in_features: int) -> dict:
    """A form with the value count of this linear: two fifths of a bitmask are kept."""
    return form | ({"nnz": out_features * in_features * 2 // 5} if form.get("sparsity") == "bitmask" else {})


def low_rank(a: dict | None, b: dict | None) -> FormOfShape:
    """A form of rank 10 by the linear's dimensions; its factors `None` where dense."""

    def build(out_features: int, in_features: int) -> dict:
        form: dict = {"rank": 10}
        if a is not None:
            form["a"] = sized(a, 10, in_features)
        if b is not None:
            form["b"] = sized(b, out_features, 10)
        return form

    return build


def packed(form: dict) -> FormOfShape:
    return lambda out_features, in_features: sized(form, out_features, in_features)


def dense(out_features: int, in_features: int) -> dict:
    return {}


@dataclass
class Case:
    """One folder: which form its linears and its embeddings have, and how it is loaded."""

    linear: FormOfShape | None = dense
    embedding: FormOfShape | None = None
    auto_class: str = "AutoModelForCausalLM"
    tied: bool = False
    dtype: torch.dtype = torch.float32
    changes: dict = field(default_factory=dict)
    max_shard_size: str = "5GB"
    offload: dict | None = None


def config_of(case: Case) -> LLMKernelConfig:
    """Dimensions that neither bytes, groups of 16 nor groups of 4 divide."""
    base = {
        "vocab_size": 67,
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "num_labels": 3,
        "dtype": case.dtype,
        "tie_word_embeddings": case.tied,
    }
    shapes = LLMKernelConfig(**base).linear_shapes()
    base["linear_forms"] = {name: case.linear(*shape) for name, shape in shapes.items()} if case.linear else {}
    if case.embedding:
        base["embed_tokens_form"] = case.embedding(67, 36)
        if not case.tied:
            base["lm_head_form"] = case.embedding(67, 36)
    return LLMKernelConfig(**base | case.changes)


def alone_cases() -> dict[str, Case]:
    forms = {"dense": dense, "low-rank": low_rank(None, None)}
    forms |= {name: packed(form) for name, form in (SPARSE | INTEGER).items()}
    return {
        f"{name}, {auto_class}": Case(form, auto_class=auto_class)
        for name, form in forms.items()
        for auto_class in CLASSES
    }


def pair_cases() -> dict[str, Case]:
    cases = {}
    names = list(PACKED)
    for name, following in zip(names, names[1:] + names[:1], strict=True):
        form, other = PACKED[name], PACKED[following]
        if name not in SPARSE | INTEGER:  # a sparse integer linear; the plain ones are among `alone_cases`
            cases[name] = Case(packed(form))
        cases[f"low-rank of {name}"] = Case(low_rank(form, form), dtype=torch.bfloat16)
        cases[f"low-rank of {name} and {following}"] = Case(low_rank(form, other))
        if name in SPARSE | INTEGER:
            cases[f"low-rank of {name} and dense"] = Case(low_rank(form, None), dtype=torch.bfloat16)
            cases[f"low-rank of dense and {name}"] = Case(low_rank(None, form))
    return cases


def embedding_cases() -> dict[str, Case]:
    forms = {name: packed(form) for name, form in PACKED.items()}
    forms |= {"dense": None, "low-rank": low_rank(None, None)}
    forms |= {f"low-rank of {name}": low_rank(form, form) for name, form in (SPARSE | INTEGER).items()}
    cases = {}
    for name, form in forms.items():
        cases[f"embeddings {name}, tied"] = Case(None, form, tied=True)
        cases[f"embeddings {name}, untied"] = Case(None, form, dtype=torch.bfloat16)
    return cases


def mixed_case(**how) -> Case:
    """Layers that differ in width, heads, forms and in what they skip."""
    first = {
        "intermediate_size": 30,
        "num_attention_heads": 2,
        "linear_forms": {
            "q_proj": sized(PACKED["bitmask + int4"], 24, 36),
            "down_proj": low_rank({"bits": 8}, None)(36, 30),
        },
    }
    layers = {0: first, 2: {"skip": ["attention"], "linear_forms": {"up_proj": {"sparsity": "2:4"}}}}
    changes = {"num_hidden_layers": 3, "per_layer_config": layers}
    return Case(packed(INTEGER["int8"]), packed(INTEGER["int4"]), tied=True, changes=changes, **how)


def offload_cases() -> dict[str, Case]:
    """A limit on memory that leaves most layers, whatever their form, on disk; with and without their buffers."""
    deep = {"num_hidden_layers": 3}
    cases = {"dense": Case(dense, changes=deep), "mixed": mixed_case()}
    for name, form in PACKED.items():
        cases[name] = Case(packed(form), changes=deep)
        cases[f"low-rank of {name}"] = Case(low_rank(form, form), changes=deep)
    cases["embeddings int4, tied"] = Case(dense, packed(INTEGER["int4"]), tied=True, changes=deep)
    cases["embeddings 2:4, untied"] = Case(dense, packed(SPARSE["2:4"]), changes=deep)
    disk_map = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    embedded = {"device_map": disk_map | {"model.rotary_emb": "cpu"}}
    with_buffers = ("int8", "int4 asymmetric", "low-rank of int4", "bitmask + int4", "embeddings int4, tied", "mixed")
    offloaded = {f"{name}, offloaded": replace(case, offload={}) for name, case in cases.items()}
    for name in with_buffers:
        offloaded[f"{name}, offloaded with buffers"] = replace(cases[name], offload={"offload_buffers": True})
    for name in ("bitmask", "int4", "2:4 + int8"):
        for tied in (True, False):
            case = Case(dense, packed(PACKED[name]), tied=tied, offload=embedded)
            offloaded[f"embeddings {name}, {'tied' if tied else 'untied'}, themselves offloaded"] = case
    return offloaded


CASES = {
    **alone_cases(),
    **pair_cases(),
    **embedding_cases(),
    **offload_cases(),
    "mixed": mixed_case(),
    "mixed, bfloat16": mixed_case(dtype=torch.bfloat16),
    "mixed, in shards": mixed_case(max_shard_size="4KB"),
}


def build(case: Case) -> modeling.LLMKernelPreTrainedModel:
    """A model of the case with no value left at a default that would hide a lost tensor."""
    torch.manual_seed(0)
    model = CLASSES[case.auto_class](config_of(case)).to(case.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)  # norms, biases, the values of a bitmask
    return model.eval()


def write(case: Case, folder: Path) -> tuple[list[torch.Tensor], dict]:
    """Saves a case; returns what it computes and the worker's entry for it."""
    model = build(case)
    model.save_pretrained(folder, max_shard_size=case.max_shard_size)
    load = {}
    if case.offload is not None:
        room = int(0.7 * sum(tensor.nbytes for tensor in model.state_dict().values()))
        load = {
            "device_map": "auto",
            "max_memory": {"cpu": room},
            "offload_folder": f"{folder}/offload",
            **case.offload,
        }
    return compute(model), {"folder": str(folder), "auto_class": case.auto_class, "load": load}


def start(mode: str, cases: dict, workspace: Path) -> subprocess.Popen:
    """One process over all folders; its caches are its own."""
    without = mode == "without package"
    site_packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    job = workspace / f"{mode}.json"
    output = str(workspace / f"{mode}.pt")
    job.write_text(json.dumps({"site_packages": site_packages if without else None, "cases": cases, "output": output}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(workspace / mode)}
    environment["PYTHONPATH"] = str(ROOT)
    flags = ["-I", "-S"] if without else []
    return subprocess.Popen(
        [sys.executable, *flags, str(WORKER), str(job)],
        env=environment,
        cwd=workspace,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict:
    """`{"expected": {case: tensors}, mode: {case: result}}`."""
    workspace = tmp_path_factory.mktemp("clean")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: how a sum is split changes its last bits
    written = {name: write(case, workspace / str(index) / "model") for index, (name, case) in enumerate(CASES.items())}
    torch.set_num_threads(threads)
    cases = {name: entry for name, (_, entry) in written.items()}
    processes = {mode: start(mode, cases, workspace) for mode in MODES}
    outcome: dict = {"expected": {name: outputs for name, (outputs, _) in written.items()}}
    try:
        for mode, process in processes.items():
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
            outcome[mode] = torch.load(workspace / f"{mode}.pt")
    finally:
        for process in processes.values():
            process.kill()
    return outcome


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_same_bits(outcome: dict, mode: str, name: str) -> None:
    result = outcome[mode][name]
    assert "error" not in result, result["error"]
    assert result["module"] == ("hf_llmkernel" if mode == "with package" else "transformers_modules")
    if CASES[name].offload is not None:
        assert result["devices"] == ["cpu", "disk"]
    expected = outcome["expected"][name]
    assert len(result["outputs"]) == len(expected) >= 1
    for actual, wanted in zip(result["outputs"], expected, strict=True):
        assert wanted.dtype == CASES[name].dtype and wanted.isfinite().all() and wanted.std() > 0
        assert torch.equal(actual, wanted)


def test_offloaded_model_saves_what_it_was_loaded_from(tmp_path: Path) -> None:
    _, entry = write(CASES["mixed, offloaded"], tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(entry["folder"], **entry["load"]).save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert tensor.dtype == again[name].dtype and torch.equal(tensor, again[name]), name


def test_every_form_is_there() -> None:
    forms = [LinearForm.from_dict(form) for case in CASES.values() for form in forms_of(case)]
    plain = chain.from_iterable(form.factors if form.rank else (form,) for form in forms)
    kinds = {(form.sparsity, form.bits) for form in plain}
    assert kinds == {(sparsity, bits) for sparsity in (None, "bitmask", "2:4") for bits in (16, 8, 4)}


def forms_of(case: Case) -> list[dict]:
    config = config_of(case)
    layers = [layer.linear_forms.values() for layer in config.per_layer_config]
    return [*chain.from_iterable(layers), config.embed_tokens_form or {}, config.lm_head_form or {}]
