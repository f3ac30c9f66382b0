"""GGUF files written: the gguf package reads the same values, llama.cpp gives the same tokens."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM
from hf_llmkernel.cli import main
from hf_llmkernel.convert import convert_checkpoint, export_checkpoint
from hf_llmkernel.convert.gguf_blocks import Q4_0, Q4_1, Q8_0, Blocks, pack_blocks, unpack_blocks

from .ggufs import gguf_name, permute
from .llama_cpp import ask, assert_llama_cpp_agrees, needs_llama_cpp
from .sources import LINEAR, LLAMA3, YARN, hashes

KINDS = gguf.GGMLQuantizationType
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
TEXT = [
    "The quick brown fox jumps over the lazy dog, don't it? 1234 times!",
    "  two  spaces\n\nand lines; naïve café 日本",
]
INT4 = {"bits": 4, "group_size": 32}
INT8 = {"bits": 8, "group_size": 32}
ZEROS = {**INT4, "symmetric": False}


def save_tokenizer(folder: Path, size: int = 320, digits: bool = False) -> None:
    """A byte-level BPE with merges, special tokens and a chat template."""
    backend = Tokenizer(models.BPE())
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [pre_tokenizers.Digits(individual_digits=True), levels]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else levels
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def save_ours(folder: Path, forms: dict[str, dict] | None = None, **changes: Any) -> LLMKernelForCausalLM:
    """A random model of this family with a tokenizer, its norms, biases and zero points all over."""
    torch.manual_seed(0)
    model = LLMKernelForCausalLM(LLMKernelConfig(**{**SIZES, "linear_forms": forms or {}, **changes})).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("zero_points"):
                tensor.copy_(torch.randint(4, 12, tensor.shape) + (0.25 if tensor.is_floating_point() else 0))
            elif "norm" in name or name.endswith("bias"):
                tensor.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def read(folder: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


def values(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """What the gguf package makes of a tensor, fp32."""
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def field(folder: Path, key: str) -> Any:
    return gguf.GGUFReader(folder / "model.gguf").fields[key].contents()


def dense_values(model: torch.nn.Module, name: str) -> torch.Tensor:
    module = model.get_submodule(name)
    return module.dense_weight() if hasattr(module, "dense_weight") else module.weight


# name: (forms, other fields, types of the linears' tensors)
RUNS: dict[str, tuple[dict[str, dict], dict[str, Any], set]] = {
    "int8": (dict.fromkeys(LINEARS, INT8), {}, {KINDS.Q8_0}),
    "int8 a row": (dict.fromkeys(LINEARS, {"bits": 8}), {"tie_word_embeddings": True}, {KINDS.Q8_0}),
    "int4": (dict.fromkeys(LINEARS, INT4), {"tie_word_embeddings": True}, {KINDS.Q4_0}),
    "int4 in wide groups": (dict.fromkeys(LINEARS, {"bits": 4, "group_size": 64}), {}, {KINDS.Q4_0}),
    "int4 with zero points": (dict.fromkeys(LINEARS, ZEROS), {}, {KINDS.Q4_1}),
    "int4 with floating zero points": (
        dict.fromkeys(LINEARS, {**ZEROS, "zero_point_dtype": "float16"}), {}, {KINDS.Q4_1}
    ),
    "sparse int4": (dict.fromkeys(LINEARS, {**INT4, "sparsity": "2:4"}), {}, {KINDS.Q4_0}),
    "sparse": (dict.fromkeys(LINEARS, {"sparsity": "2:4"}), {}, {KINDS.F32}),
    "dense": ({}, {}, {KINDS.F32}),
    "mixed, embeddings too": (
        {"q_proj": INT8, "up_proj": INT4},
        {"embed_tokens_form": INT8, "lm_head_form": INT4},
        {KINDS.Q8_0, KINDS.Q4_0, KINDS.F32},
    ),
    "biases": (dict.fromkeys(LINEARS, INT8), {"attention_bias": True, "mlp_bias": True}, {KINDS.Q8_0}),
    "one bias": ({"down_proj": {**INT8, "bias": True}}, {}, {KINDS.Q8_0, KINDS.F32}),
    "qwen2": (dict.fromkeys(LINEARS, INT4), {"attention_bias": True, "attention_out_bias": False}, {KINDS.Q4_0}),
    "qwen3": (dict.fromkeys(LINEARS, INT4), {"qk_norm": True, "head_dim": 32}, {KINDS.Q4_0}),
    "wide heads": ({}, {"head_dim": 32}, {KINDS.F32}),
    "linear rope": ({}, {"rope_parameters": LINEAR}, {KINDS.F32}),
    "yarn": ({}, {"rope_parameters": YARN}, {KINDS.F32}),
    "llama3 rope": ({}, {"rope_parameters": LLAMA3}, {KINDS.F32}),
}  # fmt: skip
PRUNED = {
    0: {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    1: {"skip": ["attention"], "intermediate_size": 32},
    2: {"linear_forms": {"o_proj": {**INT4, "bias": True}}},
}
ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3"}


@needs_llama_cpp
@pytest.mark.parametrize("run", RUNS)
def test_llama_cpp_gives_the_same_tokens(tmp_path, run):
    forms, changes, kinds = RUNS[run]
    model = save_ours(tmp_path / "ours", forms, **changes)
    before = hashes(tmp_path / "ours")
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf")
    assert (
        report.architecture == ARCHITECTURES.get(run, "llama") and report.tokenizer and report.files == ["model.gguf"]
    )
    assert report.bytes == (tmp_path / "out/model.gguf").stat().st_size
    tensors = read(tmp_path / "out")
    assert {
        tensors[f"blk.{i}.{n}.weight"].tensor_type for i in range(3) for n in ("attn_q", "ffn_up", "ffn_down")
    } == kinds
    assert_llama_cpp_agrees(model, tmp_path / "out/model.gguf", tolerance=0.1 if kinds == {KINDS.F32} else 1.0)
    assert hashes(tmp_path / "ours") == before


@needs_llama_cpp
def test_layers_of_their_own_widths_run_too(tmp_path):
    model = save_ours(tmp_path / "ours", dict.fromkeys(LINEARS, INT8), per_layer_config=PRUNED)
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf")
    assert report.architecture == "deci"
    assert field(tmp_path / "out", "deci.feed_forward_length") == [64, 32, 96]
    assert field(tmp_path / "out", "deci.attention.head_count") == [2, 0, 4]
    assert field(tmp_path / "out", "deci.attention.head_count_kv") == [1, 0, 2]
    assert_llama_cpp_agrees(model, tmp_path / "out/model.gguf", tolerance=1.0)


@pytest.mark.parametrize("keep_integers", [True, False])
def test_layers_of_their_own_widths_come_back(tmp_path, keep_integers):
    ours = save_ours(tmp_path / "ours", dict.fromkeys(LINEARS, INT8), per_layer_config=PRUNED)
    export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf")
    convert_checkpoint(tmp_path / "out/model.gguf", tmp_path / "back", keep_integers=keep_integers)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    layers = [(layer.intermediate_size, layer.skip or []) for layer in back.config.per_layer_config]
    assert layers == [(64, []), (32, ["attention"]), (96, [])]
    assert [back.config.per_layer_config[index].num_key_value_heads for index in (0, 2)] == [1, 2]
    assert back.config.per_layer_config[2].linear_form("o_proj").bias
    ids = torch.arange(2, 22).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)
    if keep_integers:
        forms = back.config.per_layer_config[0].linear_forms
        assert set(forms) == set(LINEARS) and all(form["bits"] == 8 for form in forms.values())


@pytest.mark.parametrize("run", RUNS)
def test_the_gguf_package_reads_the_same_values(tmp_path, run):
    forms, changes, _ = RUNS[run]
    model = save_ours(tmp_path / "ours", forms, **changes)
    export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf")
    tensors = read(tmp_path / "out")
    interleaved = ARCHITECTURES.get(run) is None
    tied = model.config.tie_word_embeddings
    modules = ["model.embed_tokens", *([] if tied else ["lm_head"])]
    modules += [name for name, _ in model.named_modules() if name.endswith("_proj")]
    for name in modules:
        weight = dense_values(model, name).float()
        if interleaved and name.endswith(("q_proj", "k_proj")):
            weight = permute(weight, 4 if name.endswith("q_proj") else 2)
        found = values(tensors.pop(gguf_name(f"{name}.weight")))
        if "zero points" in run and name.endswith("_proj"):  # offsets in fp16, of at most 12 steps of 0.2
            assert (found - weight).abs().max() <= 12 * 0.2 * 2**-11
        else:
            assert torch.equal(found, weight), name
    rest = {name for name in tensors if name != "rope_freqs.weight"}
    others = [key for key in model.state_dict() if "norm" in key or key.endswith("bias")]
    assert rest == {gguf_name(key) for key in others}
    assert all(tensors[name].tensor_type == KINDS.F32 for name in rest)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16", "F32"])
def test_a_chosen_type(tmp_path, kind):
    forms = {"q_proj": INT8, "k_proj": INT4, "v_proj": {"rank": 8}, "up_proj": {"sparsity": "2:4"}, "o_proj": ZEROS}
    model = save_ours(tmp_path / "ours", forms, embed_tokens_form=INT8)
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf", type=kind)
    tensors = read(tmp_path / "out")
    number = KINDS[kind]
    for name, module in model.named_modules():
        if name.endswith(("_proj", "lm_head")):
            weight = dense_values(model, name) if "v_proj" not in name else module.b.weight @ module.a.weight
            weight = permute(weight, 4 if "q_proj" in name else 2) if name.endswith(("q_proj", "k_proj")) else weight
            tensor = tensors[gguf_name(f"{name}.weight")]
            assert tensor.tensor_type == number
            exact = (name.endswith("q_proj") and kind == "Q8_0") or (name.endswith("k_proj") and kind == "Q4_0")
            weight = weight.detach().float()
            bfloat16 = weight.bfloat16().float()
            rounded = bfloat16 if kind == "BF16" else values_of(gguf.quantize(weight.numpy(), number), number)
            if not name.endswith("o_proj") or kind != "Q4_1":
                assert torch.equal(values(tensor), weight if exact else rounded), name
    kept = {"Q8_0": 4, "Q4_0": 3, "Q4_1": 3}.get(kind, 0)
    assert report.notes[0].startswith(f"{13 - kept if kind != 'Q8_0' else 9} matrices are dequantized and written anew")


def values_of(data: np.ndarray, kind: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(data, kind), dtype=np.float32))


def test_a_type_of_embedding_and_head(tmp_path):
    save_ours(tmp_path / "ours", dict.fromkeys(LINEARS, INT4), dtype="bfloat16")
    export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf", embedding_type="Q8_0")
    tensors = read(tmp_path / "out")
    kinds = [tensors[name].tensor_type for name in ("token_embd.weight", "output.weight", "blk.1.ffn_up.weight")]
    assert kinds == [KINDS.Q8_0, KINDS.Q8_0, KINDS.Q4_0]


def test_a_large_embedding_goes_out_in_pieces(tmp_path, monkeypatch):
    from hf_llmkernel.convert import gguf_folder

    save_ours(tmp_path / "ours")
    for kind in ("Q4_1", "F16"):
        export_checkpoint(tmp_path / "ours", tmp_path / f"whole {kind}", to="gguf", type=kind)
    monkeypatch.setattr(gguf_folder, "BLOCK_BYTES", 64 * 4 * 7)
    for kind in ("Q4_1", "F16"):
        export_checkpoint(tmp_path / "ours", tmp_path / f"pieces {kind}", to="gguf", type=kind)
        assert hashes(tmp_path / f"whole {kind}") == hashes(tmp_path / f"pieces {kind}")


@pytest.mark.parametrize("kind", [Q8_0, Q4_0, Q4_1])
def test_blocks_are_ggmls(kind):
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(kind))
    packed = torch.from_numpy(gguf.quantize(weight.numpy(), KINDS(kind)))
    blocks = unpack_blocks(packed, kind)
    assert blocks.codes.dtype == (torch.int8 if kind == Q8_0 else torch.uint8)
    wide = blocks.scales.float().repeat_interleave(32, 1)
    expected = blocks.codes.float() * wide if kind != Q4_0 else (blocks.codes.float() - 8) * wide
    if kind == Q4_1:
        assert isinstance(blocks, Blocks) and blocks.offsets is not None
        expected = expected + blocks.offsets.float().repeat_interleave(32, 1)
    assert torch.equal(values_of(packed.numpy(), KINDS(kind)), expected)
    assert torch.equal(pack_blocks(blocks, kind), packed)


@needs_llama_cpp
@pytest.mark.parametrize("digits", [False, True])
def test_the_tokenizer_gives_the_same_ids(tmp_path, digits):
    save_ours(tmp_path / "ours")
    save_tokenizer(tmp_path / "ours", digits=digits)
    export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf")
    assert field(tmp_path / "out", "tokenizer.ggml.pre") == ("smollm" if digits else "gpt-2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    texts = [*TEXT, "<s>dog</s> 12 fox\t\tä", "don't 日本 ..."]
    bodies = [{"content": text, "add_special": True, "parse_special": True} for text in texts]
    answers = ask(tmp_path / "out/model.gguf", [("tokenize", body) for body in bodies])
    assert [answer["tokens"] for answer in answers] == [tokenizer(text).input_ids for text in texts]
    assert field(tmp_path / "out", "tokenizer.chat_template") == tokenizer.chat_template
    ids = [field(tmp_path / "out", f"tokenizer.ggml.{name}_token_id") for name in ("padding", "bos", "eos")]
    assert ids == [0, 1, 2] and len(field(tmp_path / "out", "tokenizer.ggml.tokens")) == 320


def test_it_comes_back(tmp_path):
    model = save_ours(tmp_path / "ours", dict.fromkeys(LINEARS, INT8), tie_word_embeddings=True)
    export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf")
    convert_checkpoint(tmp_path / "out", tmp_path / "back")
    back = LLMKernelForCausalLM.from_pretrained(tmp_path / "back")
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(back.get_submodule(name).weight, module.dense_weight())
    first, second = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("ours", "back"))
    assert [first(text).input_ids for text in TEXT] == [second(text).input_ids for text in TEXT]


def test_without_a_tokenizer_and_with_terms(tmp_path):
    save_ours(tmp_path / "ours")
    (tmp_path / "ours/tokenizer.json").unlink()
    (tmp_path / "ours/LICENSE").write_text("terms")
    report = export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf")
    assert not report.tokenizer and field(tmp_path / "out", "tokenizer.ggml.model") == "none"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "LICENSE"}


OBSTACLES: dict[str, tuple[dict[str, Any], str]] = {
    "low rank": ({"linear_forms": {"down_proj": {"rank": 8}}}, r"layer 0, down_proj: is stored low-rank \(rank 8\), "),
    "8 bits with zeros": (
        {"linear_forms": {"up_proj": {**INT8, "symmetric": False}}},
        r"layer 0, up_proj: is stored int8 in groups of 32 with zero points of uint8, and no type of ggml.*\(2 more",
    ),
    "narrow groups": ({"embed_tokens_form": {"bits": 4, "group_size": 16}}, r"embed_tokens: is stored int4 in groups"),
    "columns": (
        {"intermediate_size": 80, "linear_forms": {"down_proj": {"bits": 8}}},
        r"layer 0, down_proj: has 80 columns, which are no whole blocks of 32 of Q8_0",
    ),
    "sparse with floating zeros": (
        {"linear_forms": {"q_proj": {**ZEROS, "zero_point_dtype": "float16", "sparsity": "2:4"}}},
        r"layer 0, q_proj: is stored 2:4 sparse int4 in groups of 32 with zero points of float16",
    ),
    "an activation": ({"hidden_act": "gelu"}, r"all layers: hidden_act='gelu', and llama\.cpp has silu there"),
    "no gate": ({"mlp_gated": False}, r"all layers: mlp_gated=False, and llama\.cpp has a gate there"),
    "a window": ({"sliding_window": 8}, r"layer 0: layer_types says 'sliding_attention', and llama\.cpp attends"),
    "no feed-forward": ({"per_layer_config": {2: {"skip": ["mlp"]}}}, r"layer 2: skip=\['mlp'\], and llama\.cpp"),
    "no first attention": ({"per_layer_config": {0: {"skip": ["attention"]}}}, r"layer 0: skip=\['attention'\], "),
    "norms and widths": (
        {"qk_norm": True, "per_layer_config": {1: {"intermediate_size": 64}}},
        r"all layers: qk_norm=True, which llama\.cpp has with layers alike only",
    ),
    "norms and biases": ({"qk_norm": True, "mlp_bias": True}, r"all layers: down_proj has a bias, and llama"),
    "dynamic rope": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        r"all layers: rope type 'dynamic', and llama\.cpp has default, linear, yarn and llama3",
    ),
    "a yarn of its own": ({"rope_parameters": {**YARN, "beta_fast": 16.0}}, r"all layers: beta_fast=16\.0 of yarn"),
}  # fmt: skip


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_obstacles_are_named(tmp_path, obstacle):
    changes, message = OBSTACLES[obstacle]
    save_ours(tmp_path / "ours", **{"forms": changes.pop("linear_forms", None), **changes})
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match=rf"^to=gguf: {message}") as raised:
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf")
    assert "\n" not in str(raised.value) and hashes(tmp_path) == before


def test_scales_that_do_not_fit(tmp_path):
    model = save_ours(
        tmp_path / "ours",
        {"up_proj": {**INT8, "scale_dtype": "bfloat16"}, "q_proj": {**INT8, "scale_dtype": "float32"}},
    )
    message = r"^to=gguf: layer 0, q_proj: has scales of float32 that ggml's float16 does not hold \(2 more"
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf")
    for layer in model.model.layers:
        layer.self_attn.q_proj.scales.copy_(layer.self_attn.q_proj.scales.half())
    model.save_pretrained(tmp_path / "held")
    export_checkpoint(tmp_path / "held", tmp_path / "out", to="gguf")
    assert torch.equal(
        values(read(tmp_path / "out")["blk.0.ffn_up.weight"]), model.model.layers[0].mlp.up_proj.dense_weight()
    )


@pytest.mark.parametrize(("options", "message"), [
    ({"to": "gguf", "type": "Q6_K"}, r"type=Q6_K: is not one of \['F32', 'F16'"),
    ({"to": "gguf", "embedding_type": "q8"}, r"embedding_type=q8: is not one of"),
    ({"to": "gguf", "dtype": "float16"}, r"dtype=float16: a GGUF file has types; choose one by type \(--type F16\)"),
    ({"to": "llama", "type": "F16"}, r"type=F16: is of GGUF files, and to=llama; choose a dtype \(--dtype\)"),
])  # fmt: skip
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_checkpoint(tmp_path, tmp_path / "out", **options)


def change_tokenizer(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("changes", "message"), [
    ({"pre_tokenizer": {"type": "Whitespace"}}, r"it splits text like none of \['gpt-2', 'smollm', 'qwen2',"),
    ({"normalizer": {"type": "Lowercase"}}, r"its normalizer is 'Lowercase', which llama\.cpp has with no byte-level"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, r"it puts a space before the text"),
    ({"model": {"type": "Unigram", "vocab": []}}, r"its model is 'Unigram', and a GGUF file is written with BPE only"),
    ({"added_tokens": [{"id": 320, "content": "x", "special": True}]}, r"it has token 320, and the embedding 320 rows"),
])  # fmt: skip
def test_tokenizers_that_llama_cpp_does_not_have(tmp_path, changes, message):
    save_ours(tmp_path / "ours")
    change_tokenizer(tmp_path / "ours", **changes)
    with pytest.raises(ValueError, match=rf"^to=gguf: .*tokenizer\.json: {message}.*without this file"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of numpy, beside the one error
def test_values_beyond_the_type(tmp_path):
    model = save_ours(tmp_path / "ours")
    for kind, value in (("F16", 1e6), ("Q8_0", 1e8), ("Q4_0", 1e8), ("Q4_1", 1e6), ("Q8_0", 3e38), ("Q4_1", 3e38)):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3] = value
        model.save_pretrained(tmp_path / "ours")
        message = rf"^type={kind}: layer 1, up_proj has values beyond its range, up to [13]e\+\d\d; choose BF16 or F32"
        with pytest.raises(ValueError, match=message):
            export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf", type=kind)
        assert not (tmp_path / "out").exists()


def test_offsets_beyond_float16(tmp_path):
    model = save_ours(tmp_path / "ours", {"up_proj": ZEROS})
    model.model.layers[2].mlp.up_proj.scales[3, 1] = 3e4  # which times a zero point of at least 4 is an offset
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"^type=Q4_1: layer 2, up_proj has values beyond its range, up to \S+; ch"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "dtype", "underflowed", "subnormal"), [
    ("F16", "float32", 3 * 64 + 1, 64 + 2),
    ("F16", "float16", None, None),
    ("Q8_0", "float32", 3 * 64, 64),
    ("Q4_0", "bfloat16", 3 * 64, 64),
    ("Q4_1", "float32", 3 * 64, 64),
    ("F32", "bfloat16", None, None),
])  # fmt: skip
def test_what_rounding_dense_matrices_loses_is_counted(tmp_path, capfd, kind, dtype, underflowed, subnormal):
    model = save_ours(tmp_path / "ours")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.where(parameter.abs() < 0.02, 0.02, parameter))
        up, embedding = model.model.layers[1].mlp.up_proj.weight, model.model.embed_tokens.weight
        up[:3], embedding[5] = 2e-9, 1e-5  # no scale of float16; one that is subnormal, as the values are
        up[7, :3] = torch.tensor([1e-8, 2e-5, -3e-5])  # beside others of the usual size
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "ours")
    command = ["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "gguf", "--type", kind, "--json"]
    assert main(command) == 0
    report = json.loads(capfd.readouterr().out)
    if underflowed is None:
        assert report["precision"] is None and not report["notes"]
        return
    matrices = [parameter.numel() for parameter in model.parameters() if parameter.dim() == 2]
    counts = {"matrices": len(matrices), "values": sum(matrices), "underflowed": underflowed, "subnormal": subnormal}
    assert report["precision"] == {"dtype": kind, **counts}
    assert report["notes"] == [f"23 floating matrices are rounded (embed_tokens: to {kind})"]
    written = values(read(tmp_path / "out")["blk.1.ffn_up.weight"])
    assert not written[:3].any() and (written != 0).sum() > 0.5 * written.numel()


def test_the_command(tmp_path, capfd):
    save_ours(tmp_path / "ours", {"up_proj": {"rank": 8}})
    command = ["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "gguf"]
    assert main(command) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: to=gguf: layer 0, up_proj: is stored low-rank (rank 8)")
    assert main([*command, "--type", "Q8_0", "--embedding-type", "F16", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["dtype"] == "F16, Q8_0" and report["notes"][0].startswith("3 matrices are dequantized")
