"""Whole runs: what `from_pretrained` makes of the result against a reference that is put together by other means."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_llmkernel.compress import Recipe, compress
from hf_llmkernel.compress.calibration import calibration_ids
from hf_llmkernel.compress.command import render_compress
from hf_llmkernel.model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from hf_llmkernel.model.modeling_llm_kernel import LLMKernelForCausalLM

from ..conftest import WITHOUT_PACKAGE
from .conftest import TINY, save_tiny, word_tokenizer
from .quantize.test_stage import nearest_on_grid

IDS = torch.arange(40).view(2, 20) % 90
PRUNE = {"prune_ffn": {"ratio": 0.25, "align": 16, "method": "wanda"}}
INT8 = {"quantize": {"bits": 8, "group_size": 16}}
VARIANTS = {
    "tied": {},
    "untied_with_biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "qk_norm": True},
    "skips": {"per_layer_config": {1: {"skip": ["attention"]}, 2: {"skip": ["mlp"]}}},
    "not_gated": {"mlp_gated": False, "hidden_act": "relu", "sliding_window": 7},
}


def recipe_for(text, *stages, dtype=None) -> Recipe:
    calibration = {"source": str(text), "samples": 12, "length": 48}
    return Recipe.load({"dtype": dtype, "calibration": calibration, "stages": list(stages)})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def load(folder) -> LLMKernelForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def reference(model: LLMKernelForCausalLM, ids: torch.Tensor, width: int, update: bool, group: int | None):
    """The dense model changed in place, layer by layer, every activation taken from the whole model."""
    for layer in model.model.layers:
        if not layer.feeds:
            continue
        mlp = layer.mlp
        seen = []
        hook = mlp.down_proj.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
        model(ids)
        hook.remove()
        x = seen[0].flatten(0, 1).double()
        weight = mlp.down_proj.weight.double()
        scores = [float(x[:, j].norm() * weight[:, j].norm()) for j in range(x.shape[1])]
        keep = sorted(sorted(range(x.shape[1]), key=lambda j: -scores[j])[:width])
        down = weight[:, keep]
        if update:
            ridge = (0.1 * (x[:, keep] ** 2).sum(0).mean()).sqrt()
            rows = torch.cat([x[:, keep], ridge * torch.eye(width, dtype=torch.float64)])
            down = torch.linalg.lstsq(rows, torch.cat([x @ weight.T, ridge * down.T])).solution.T
        mlp.down_proj.weight = torch.nn.Parameter(down.float())
        for linear in [mlp.up_proj] + ([mlp.gate_proj] if mlp.gated else []):
            linear.weight = torch.nn.Parameter(linear.weight[keep])
            linear.bias = None if linear.bias is None else torch.nn.Parameter(linear.bias[keep])
        for linear in layer.modules():
            if group is not None and isinstance(linear, torch.nn.Linear):
                linear.weight = torch.nn.Parameter(nearest_on_grid(linear.weight, 8, group))
    return model


@pytest.mark.parametrize("update", ["none", "least_squares"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pruned_checkpoint_is_the_reference(tmp_path, text, variant, update):
    dense = save_tiny(tmp_path / "dense", **VARIANTS[variant])
    recipe = recipe_for(text, {"prune_ffn": {**PRUNE["prune_ffn"], "update": update}})
    compress(tmp_path / "dense", recipe, tmp_path / "out", progress=False)
    ids = calibration_ids(recipe.calibration, word_tokenizer(), dense.config)
    before = logits(dense)
    expected = logits(reference(dense, ids, 48, update == "least_squares", None))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-3, atol=1e-3)
    assert (expected - before).abs().max() > 0.05


def test_pruned_and_quantized_checkpoint_is_the_reference(tmp_path, tiny, text):
    recipe = recipe_for(text, {"prune_ffn": {**PRUNE["prune_ffn"], "update": "none"}}, INT8)
    result = compress(tiny, recipe, tmp_path / "out", progress=False)
    dense = LLMKernelForCausalLM.from_pretrained(tiny)
    ids = calibration_ids(recipe.calibration, word_tokenizer(), dense.config)
    expected = logits(reference(dense, ids, 48, False, 16))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-3, atol=1e-3)

    config = LLMKernelConfig.from_pretrained(tmp_path / "out")
    assert not config.is_heterogeneous and config.intermediate_size == 48
    assert set(config.linear_forms) == set(config.linear_shapes())
    assert result.calibration_tokens == 12 * 48
    assert result.stages[0]["result"] == [
        {"neurons_before": 64, "neurons": 48, "ratio_reached": 0.25, "layers": [0, 1, 2]}
    ]


def test_bytes_are_those_the_forms_promise(tmp_path, tiny, text):
    result = compress(tiny, recipe_for(text, PRUNE, INT8, dtype="bfloat16"), tmp_path / "out", progress=False)
    config = LLMKernelConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == torch.bfloat16
    expected = 2 * (96 * 32 + 32 + 3 * 2 * 32)  # embedding and norms
    for name, (rows, columns) in config.linear_shapes().items():
        stored = LinearForm.from_dict(config.linear_forms[name]).stored_tensors(rows, columns)
        sizes = {"int8": 1, "float16": 2}
        expected += 3 * sum(torch.Size(shape).numel() * sizes[dtype] for shape, dtype in stored.values())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert expected == result.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_layers_that_differ_are_in_per_layer_config(tmp_path, tiny, text):
    stages = {"prune_ffn": {**PRUNE["prune_ffn"], "layers": [1, 2]}}, {"quantize": {"bits": 4, "layers": [0, 2]}}
    result = compress(tiny, recipe_for(text, *stages), tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["intermediate_size"] == 64
    assert written["per_layer_config"]["1"] == {"intermediate_size": 48}
    assert written["per_layer_config"]["2"] == {"linear_forms": {}}
    assert [variant["layers"] for variant in result.stages[1]["result"]] == [[0], [1]]  # 48 columns: a short group
    model = load(tmp_path / "out")
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [64, 48, 64]
    assert [type(layer.mlp.up_proj).__name__ for layer in model.model.layers] == ["PackedLinear"] * 2 + ["Linear"]
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_packed_when_asked(tmp_path, tied):
    dense = save_tiny(tmp_path / "dense", tie_word_embeddings=tied)
    stage = {"quantize": {"bits": 8, "group_size": 16, "embeddings": True, "include": ["q_proj"]}}
    compress(tmp_path / "dense", {"stages": [stage]}, tmp_path / "out", progress=False)
    model = load(tmp_path / "out")
    names = {name for name in load_file(tmp_path / "out" / "model.safetensors") if "layers" not in name}
    head = set() if tied else {"lm_head.values", "lm_head.scales"}
    assert names == {"model.embed_tokens.values", "model.embed_tokens.scales", "model.norm.weight"} | head
    for packed, full in ((model.model.embed_tokens, dense.model.embed_tokens), (model.lm_head, dense.lm_head)):
        torch.testing.assert_close(packed.dense_weight(), nearest_on_grid(full.weight.detach(), 8, 16))


def test_calibration_sees_the_embedding_as_it_is_stored(tmp_path, tiny, text):
    quantize = {"quantize": {"bits": 4, "group_size": 16, "embeddings": True, "include": ["q_proj"]}}
    together = recipe_for(text, PRUNE, quantize)
    compress(tiny, together, tmp_path / "together", progress=False)
    compress(tiny, {"stages": [quantize]}, tmp_path / "embedding", progress=False)
    dense = LLMKernelForCausalLM.from_pretrained(tiny)
    dense.model.embed_tokens.weight.data = load(tmp_path / "embedding").model.embed_tokens.dense_weight()
    dense.tie_weights()
    reference(dense, calibration_ids(together.calibration, word_tokenizer(), dense.config), 48, True, None)
    first = load(tmp_path / "together").model.layers[0].mlp
    torch.testing.assert_close(first.down_proj.weight, dense.model.layers[0].mlp.down_proj.weight, rtol=1e-3, atol=1e-3)


LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.arange(40).view(2, 20) % 90).logits
text = pipeline("text-generation", model=model, tokenizer=tokenizer)("w1 w2", max_new_tokens=3)[0]["generated_text"]
torch.save({"logits": logits, "text": text, "module": type(model).__module__}, sys.argv[2])
"""


def test_clean_process_computes_the_same(tmp_path, tiny, text):
    compress(tiny, recipe_for(text, PRUNE, INT8, dtype="bfloat16"), tmp_path / "out", progress=False)
    environment = {"LLMKERNEL_REGISTRATION": "off", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", WITHOUT_PACKAGE + LOADER, str(tmp_path / "out"), str(tmp_path / "result.pt")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    result = torch.load(tmp_path / "result.pt")
    assert result["module"].startswith("transformers_modules")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(result["logits"], logits(load(tmp_path / "out")))
    torch.set_num_threads(threads)
    assert result["text"].startswith("w1 w2")


def test_companions_and_recipe_travel(tmp_path, tiny, text):
    recipe = recipe_for(text, PRUNE)
    compress(tiny, recipe, tmp_path / "out", progress=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "recipe.yaml", "modeling_llm_kernel.py"} <= names
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == recipe


@pytest.mark.parametrize("in_memory", [True, False])
def test_another_family_is_converted_first(tmp_path, text, in_memory):
    fields = {name: value for name, value in TINY.items() if name != "initializer_range"}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**fields, initializer_range=0.2)).eval()
    llama.save_pretrained(tmp_path / "llama")
    word_tokenizer().save_pretrained(tmp_path / "llama")
    source, tokenizer = (llama, word_tokenizer()) if in_memory else (tmp_path / "llama", None)
    recipe = recipe_for(text, {"prune_ffn": {**PRUNE["prune_ffn"], "update": "none"}})
    compress(source, recipe, tmp_path / "out", tokenizer, progress=False)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not list((tmp_path / "out").glob("source-*"))
    family = LLMKernelForCausalLM(LLMKernelConfig(**TINY)).eval()
    family.load_state_dict(llama.state_dict())
    ids = calibration_ids(recipe.calibration, word_tokenizer(), family.config)
    expected = logits(reference(family, ids, 48, False, None))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-3, atol=1e-3)


def test_tensor_that_is_not_finite_is_named(tmp_path, tiny):
    damaged = damaged_copy(tiny, tmp_path, lambda tensors: tensors[UP].view(-1)[7].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{UP}: holds NaN in .*model.safetensors"):
        compress(damaged, {"stages": [INT8]}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_tensors_that_contradict_the_configuration_are_named(tmp_path, tiny):
    def drop(tensors):
        del tensors[UP]

    def shorten(tensors):
        tensors[UP] = tensors[UP][:-1].clone()

    def rename(tensors):
        tensors["model.layers.7.mlp.up_proj.weight"] = tensors.pop(UP)

    for change, message in ((drop, f"{UP}: missing"), (shorten, rf"{UP}: has shape \[63, 32\]"), (rename, "3 layers")):
        damaged = damaged_copy(tiny, tmp_path / change.__name__, change)
        with pytest.raises(ValueError, match=message):
            compress(damaged, {"stages": [INT8]}, tmp_path / "out", progress=False)


UP = "model.layers.2.mlp.up_proj.weight"


def damaged_copy(folder, target, change):
    target.mkdir(exist_ok=True)
    copy = target / "damaged"
    copy.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    return copy


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([INT8, PRUNE], "prune_ffn: layers.0.mlp.down_proj is stored as int8, .*prune before sparsify"),
        ([INT8, INT8], "quantize: layers.0.self_attn.q_proj is stored as int8"),
        ([{"prune_ffn": {"ratio": 0.25}}], "ratio=0.25: of 64 leaves 48"),
        ([{"quantize": {"bits": 8, "layers": [0, 4]}}], r"layers=\[0, 4\] is beyond the 3 layers"),
    ],
)
def test_recipe_that_does_not_fit_stops_before_any_work(tmp_path, tiny, text, stages, message):
    with pytest.raises(ValueError, match=message):
        compress(tiny, recipe_for(text, *stages), tmp_path / "out", progress=False)
    assert not (tmp_path / "out.part").exists()


def test_compressed_checkpoint_says_why_it_is_not_pruned(tmp_path, tiny, text):
    compress(tiny, {"stages": [INT8]}, tmp_path / "int8", progress=False)
    with pytest.raises(ValueError, match="down_proj is stored as .*prune before sparsify"):
        compress(tmp_path / "int8", recipe_for(text, PRUNE), tmp_path / "out", progress=False)


def test_what_was_decided_and_noted_is_recorded_beside_the_weights(tmp_path, tiny, text):
    stages = [{"drop_layers": {"count": 1, "metric": "block_influence"}}, PRUNE]
    result = compress(tiny, recipe_for(text, *stages), tmp_path / "out", progress=False)
    record = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert record["stages"] == json.loads(json.dumps(result.stages)) and record["notes"] == result.notes
    assert record["calibration_tokens"] == result.calibration_tokens > 0
    assert record["weight_bytes"] == result.weight_bytes
    ((index, part),) = record["stages"][0]["decision"]["dropped"]
    assert f"drop_layers: dropped {part} {index}; " in render_compress(result.to_dict())


def test_a_stage_that_would_do_nothing_is_refused(tmp_path, tiny, text):
    for settings in ({"include": []}, {"exclude": ["*"]}):
        with pytest.raises(ValueError, match="sparsify: include and exclude leave none of"):
            compress(tiny, recipe_for(text, {"sparsify": {"sparsity": 0.5, **settings}}), tmp_path / "out")


def test_inputs_that_are_all_zero_stop_no_stage(tmp_path, tiny, text):
    dead = damaged_copy(tiny, tmp_path / "dead", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].zero_())
    compress(dead, recipe_for(text, PRUNE), tmp_path / "out", word_tokenizer(), progress=False)
    assert load(tmp_path / "out").model.layers[1].mlp.up_proj.weight.eq(0).all()


def test_output_in_the_way_and_missing_tokenizer_are_named(tmp_path, tiny, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        compress(tiny, {"stages": [INT8]}, tmp_path / "out", progress=False)
    bare = damaged_copy(tiny, tmp_path / "bare", lambda tensors: None)
    with pytest.raises(ValueError, match="damaged: its tokenizer does not load .*pass a tokenizer"):
        compress(bare, recipe_for(text, PRUNE), tmp_path / "other", progress=False)


def test_evaluation_text_gives_a_report(tmp_path, tiny, text):
    evaluation = {"source": str(text), "context": 40, "tokens": 160, "speed": False}
    result = compress(tiny, {"evaluation": evaluation, "stages": [INT8]}, tmp_path / "out", progress=False)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == result.report
    assert (report["model"], report["baseline"]["model"]) == ("out", tiny.name)
    assert report["tokens_evaluated"] == 160 and report["perplexity"] != report["baseline_perplexity"]
    assert report["bytes_on_disk"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_windows_of_evaluation_follow_a_model_of_fewer_positions(tmp_path, tiny, text, caplog):
    evaluation = {"source": str(text), "tokens": 8192, "speed": False}
    report = compress(tiny, {"evaluation": evaluation, "stages": [INT8]}, tmp_path / "out", progress=False).report
    assert (report["context_length"], report["tokens_evaluated"] % 128) == (128, 0)
    told = [record.getMessage() for record in caplog.records if "evaluation" in record.getMessage()]
    assert told == ["evaluation: on windows of 128 tokens, the model's max_position_embeddings"]


def test_a_model_beyond_the_memory_is_not_loaded_whole(tmp_path, tiny, text):
    evaluation = {"source": str(text), "context": 40, "tokens": 160}
    recipe = {"evaluation": evaluation, "stages": [INT8]}
    report = compress(tiny, recipe, tmp_path / "out", progress=False, memory_bytes=1000).report
    assert report["decode_tokens_per_second"] is None and report["perplexity"] > 1
    assert "allowed are 0.0 GB" in report["reasons"]["decode_tokens_per_second"]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"context": 1000}, "evaluation.context=1000: is above the model's max_position_embeddings=128"),
        ({"context": 100, "tokens": 100, "source": "no-such-text"}, "is no file or folder and not built in"),
    ],
)
def test_evaluation_that_cannot_be_stops_before_any_work(tmp_path, tiny, text, evaluation, message):
    with pytest.raises(ValueError, match=message):
        recipe = {"evaluation": {"source": str(text), **evaluation}, "stages": [INT8]}
        compress(tiny, recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out.part").exists()


def test_biases_of_single_layers_stay_theirs(tmp_path, text):
    dense = save_tiny(tmp_path / "dense", per_layer_config={1: {"attention_bias": True, "mlp_bias": True}})
    compress(tmp_path / "dense", {"stages": [INT8]}, tmp_path / "out", progress=False)
    model = load(tmp_path / "out")
    assert [layer.self_attn.q_proj.bias is not None for layer in model.model.layers] == [False, True, False]
    assert torch.equal(model.model.layers[1].mlp.up_proj.bias, dense.model.layers[1].mlp.up_proj.bias)
