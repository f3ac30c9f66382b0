"""GGUF files: bit-equal to transformers' own loading, and what a file says is used or refused."""

import os

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_llmkernel.checkpoint import CheckpointReader
from hf_llmkernel.convert import convert_checkpoint
from hf_llmkernel.convert.gguf_file import GGUFFile
from hf_llmkernel.data.fetch import fetch_model
from hf_llmkernel.model.configuration_llm_kernel import LinearForm
from hf_llmkernel.model.linear_llm_kernel import unpack_nibbles

from .ggufs import Q8, permute, write_gguf
from .sources import hashes, padded_batch

KINDS = gguf.GGMLQuantizationType
MIXED = (KINDS.Q8_0, KINDS.F16, KINDS.Q4_1, KINDS.F32, KINDS.BF16, KINDS.Q5_0)


CONFIGURED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_parameters",
    "rms_norm_eps",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "vocab_size",
)


def assert_equal_to_the_library(source, output) -> torch.nn.Module:
    """Compares tensors, configuration, token ids and chat template, and gives the converted model."""
    stock = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    reader = CheckpointReader(output)
    expected = stock.state_dict()
    tied = {"lm_head.weight"} if stock.config.tie_word_embeddings else set()
    assert set(reader.keys()) == set(expected) - tied
    for name in reader:
        assert torch.equal(reader.tensor(name), expected[name]), name
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    assert type(model).__name__ == "LLMKernelForCausalLM"
    for name in CONFIGURED:
        assert getattr(model.config, name) == getattr(stock.config, name), name
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    ours = AutoTokenizer.from_pretrained(output)
    for text in ("Hello, world 123", "<s>a b c</s>  x\n\ny é"):
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == theirs.chat_template is not None
    assert [ours.bos_token, ours.eos_token, ours.pad_token] == [theirs.bos_token, theirs.eos_token, theirs.pad_token]
    ids, mask = padded_batch("left")
    with torch.no_grad():
        logits = [each(ids, attention_mask=mask).logits for each in (stock, model)]
    assert ((logits[0] - logits[1]).abs() * mask[..., None]).max() <= 1e-4
    return model


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
        ("qwen2", {}),
        # The library's own loading takes Qwen3's usual size of a head for every file's.
        ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    ],
)
def test_bit_equal_to_the_library(tmp_path, architecture, changes):
    source = tmp_path / "model.gguf"
    write_gguf(source, architecture, MIXED, **changes)
    before = hashes(tmp_path)
    report = convert_checkpoint(source, tmp_path / "output")
    assert (report.family, report.dtype, report.tokenizer) == (architecture, "float32", True)
    assert_equal_to_the_library(source, tmp_path / "output")
    assert hashes(tmp_path).items() >= before.items()


def test_smollm2_is_bit_equal_to_the_library(tmp_path):
    source = fetch_model("smollm2-135m-instruct")
    report = convert_checkpoint(source, tmp_path / "output")
    assert report.parameters == 134_515_008
    model = assert_equal_to_the_library(source, tmp_path / "output")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_biases_of_llama_are_found_and_put_in_order(tmp_path):
    stock = write_gguf(tmp_path / "model.gguf", kinds=(KINDS.F32,), attention_bias=True, mlp_bias=True)
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "output")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    for name, tensor in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_head_size_of_qwen3_is_the_files_own(tmp_path):
    stock = write_gguf(tmp_path / "model.gguf", "qwen3", (KINDS.F32,), head_dim=24)
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "output")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output").eval()
    ids, mask = padded_batch("left")
    with torch.no_grad():
        difference = (model(ids, attention_mask=mask).logits - stock(ids, attention_mask=mask).logits).abs()
    assert (difference * mask[..., None]).max() <= 1e-4


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"llama.rope.scaling.type": "none"}, {"rope_type": "default"}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.original_context_length": 128,
            },
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_rope_scaling_in_the_metadata(tmp_path, extra, expected):
    write_gguf(tmp_path / "model.gguf", extra=extra)
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "output")
    rope = AutoConfig.from_pretrained(tmp_path / "output").rope_parameters
    assert rope == {**expected, "rope_theta": 10000.0}


def llama3_factors(scaling: dict, head_dim: int = 16) -> np.ndarray:
    """What llama.cpp divides the frequencies by, from the library's own frequencies."""
    config = LlamaConfig(head_dim=head_dim, rope_parameters=scaling, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / scaling["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy()


def test_frequency_factors_of_llama_3(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    changes = {"max_position_embeddings": 131072, "rope_parameters": scaling}
    factors = {"rope_freqs.weight": llama3_factors(scaling)}
    stock = write_gguf(tmp_path / "model.gguf", kinds=(KINDS.F32,), tensors=factors, **changes)
    report = convert_checkpoint(tmp_path / "model.gguf", tmp_path / "output")
    assert report.dropped == ["rope_freqs.weight"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output").eval()
    assert model.config.rope_parameters == scaling
    ids, mask = padded_batch("left")
    with torch.no_grad():
        difference = (model(ids, attention_mask=mask).logits - stock(ids, attention_mask=mask).logits).abs()
    assert (difference * mask[..., None]).max() <= 1e-4


def test_other_frequency_factors_are_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", tensors={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"the factors in rope_freqs\.weight are not Llama 3's"):
        convert_checkpoint(tmp_path / "model.gguf", tmp_path / "output")


def test_a_window_makes_it_mistral(tmp_path):
    write_gguf(tmp_path / "model.gguf", extra={"llama.attention.sliding_window": 8})
    assert convert_checkpoint(tmp_path / "model.gguf", tmp_path / "output").family == "mistral"
    config = AutoConfig.from_pretrained(tmp_path / "output")
    assert config.sliding_window == 8 and set(config.layer_types) == {"sliding_attention"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8}, r"llama\.expert_count=8 is not supported; use another checkpoint"),
        ({"llama.logit_scale": 2.0}, r"llama\.logit_scale=2\.0 is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope scaling 'longrope' is not supported; the known ones are"),
        ({"llama.rope.scaling.attn_factor": 2.0}, r"rope\.scaling\.attn_factor=2\.0 is not supported"),
        ({"llama.attention.sliding_window": [4, 8, 4]}, r"llama\.attention\.sliding_window differs by layer"),
        ({"split.count": 3}, r"is one of 3 parts; join them with llama-gguf-split"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, extra, message):
    write_gguf(tmp_path / "model.gguf", extra=extra, tokens=False)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "model.gguf", tmp_path / "output")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_an_unknown_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture='mamba' is not supported; .*\['llama', 'qwen2', "):
        convert_checkpoint(tmp_path / "model.gguf", tmp_path / "output")


def test_files_cut_short_anywhere(tmp_path):
    whole = tmp_path / "whole.gguf"
    write_gguf(whole)
    data = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 10, 30, 500, 3000, len(data) // 2, len(data) - 200):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: (is not a readable GGUF file|truncated).*; fetch it again\."):
            convert_checkpoint(cut, tmp_path / "output")
    cut.write_bytes(b"GGML" + data[4:])
    with pytest.raises(ValueError, match="it does not begin with GGUF"):
        GGUFFile(cut)
    assert not (tmp_path / "output").exists()


def test_an_unexpected_tensor(tmp_path):
    write_gguf(tmp_path / "model.gguf", tensors={"blk.0.attn_sinks.weight": np.ones(32, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"blk\.0\.attn_sinks\.weight: unexpected in .*model\.gguf"):
        convert_checkpoint(tmp_path / "model.gguf", tmp_path / "output")


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of numpy, beside the one error
def test_values_that_are_not_finite(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, kinds=(KINDS.F32,))
    packed = GGUFFile(path).packed["model.layers.1.mlp.up_proj.weight"]
    with path.open("r+b") as file:
        file.seek(packed.offset + 8)
        file.write(np.float32("nan").tobytes())
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds NaN in .*model\.gguf"):
        convert_checkpoint(path, tmp_path / "output")
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_a_file_without_tokenizer_says_so(tmp_path):
    write_gguf(tmp_path / "model.gguf", tokens=False)
    assert convert_checkpoint(tmp_path / "model.gguf", tmp_path / "output").tokenizer is False


def test_choosing_a_file_of_a_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_gguf(source / "a.gguf")
    assert convert_checkpoint(source, tmp_path / "only").family == "llama"
    write_gguf(source / "b.gguf", "qwen2")
    with pytest.raises(ValueError, match=r"has several GGUF files, \['a\.gguf', 'b\.gguf'\]; choose one by gguf_file"):
        convert_checkpoint(source, tmp_path / "output")
    assert convert_checkpoint(source, tmp_path / "chosen", gguf_file="b.gguf").family == "qwen2"


def test_a_cast(tmp_path):
    write_gguf(tmp_path / "model.gguf", kinds=(Q8,))
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "exact")
    assert convert_checkpoint(tmp_path / "model.gguf", tmp_path / "cast", dtype="bfloat16").dtype == "bfloat16"
    exact, cast = (CheckpointReader(tmp_path / name) for name in ("exact", "cast"))
    assert all(torch.equal(cast.tensor(name), exact.tensor(name).bfloat16()) for name in exact)


def test_rows_in_small_pieces_are_the_same_rows(tmp_path, monkeypatch):
    from hf_llmkernel.convert import gguf_file

    write_gguf(tmp_path / "model.gguf", kinds=MIXED)
    whole, pieces = GGUFFile(tmp_path / "model.gguf"), GGUFFile(tmp_path / "model.gguf")
    for file in (whole, pieces):
        file.undo_permutation([4] * 3, [2] * 3)
    expected = {name: whole.values(name) for name in whole}
    monkeypatch.setattr(gguf_file, "BLOCK_BYTES", 64 * 4 * 5)
    for name in pieces:
        assert torch.equal(pieces.values(name), expected[name])
    assert len(list(pieces.blocks("model.embed_tokens.weight"))) == 20


def test_the_permutation_is_the_inverse_of_llama_cpps(tmp_path):
    stock = write_gguf(tmp_path / "model.gguf", kinds=(KINDS.F32,))
    file = GGUFFile(tmp_path / "model.gguf")
    key = "model.layers.0.self_attn.q_proj.weight"
    weight = stock.state_dict()[key]
    assert torch.equal(file.values(key), permute(weight, 4)) and not torch.equal(file.values(key), weight)
    file.undo_permutation([4] * 3, [2] * 3)
    assert torch.equal(file.values(key), weight)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1])
def test_integers_are_kept(tmp_path, architecture, kind):
    path = tmp_path / "model.gguf"
    write_gguf(path, architecture, (kind,), tie_word_embeddings=kind == KINDS.Q4_0)
    report = convert_checkpoint(path, tmp_path / "kept", keep_integers=True)
    assert convert_checkpoint(path, tmp_path / "floating").parameters == report.parameters and not report.notes
    kept, floating = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("kept", "floating"))
    form = LinearForm.from_dict(kept.config.linear_forms["down_proj"])
    assert (form.bits, form.group_size, form.symmetric) == (8 if kind == KINDS.Q8_0 else 4, 32, kind != KINDS.Q4_1)
    assert len(kept.config.linear_forms) == 7 and LinearForm.from_dict(kept.config.embed_tokens_form) == form
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    codes = np.array(raw["blk.1.ffn_down.weight"].data).reshape(64, 3, -1)[..., 4 if kind == KINDS.Q4_1 else 2 :]
    if kind != KINDS.Q8_0:
        codes = np.concatenate((codes & 15, codes >> 4), -1)
    stored = CheckpointReader(tmp_path / "kept").tensor("model.layers.1.mlp.down_proj.values")
    stored = stored if kind == KINDS.Q8_0 else unpack_nibbles(stored, 96)
    assert torch.equal(stored.view(torch.uint8), torch.from_numpy(codes.reshape(64, 96).view(np.uint8)))
    for name, module in floating.named_modules():
        if name.endswith(("_proj", "embed_tokens")):
            weight = kept.get_submodule(name).dense_weight()
            # Of Q4_1, one rounding of the zero point: it is the offset divided by the scale.
            assert (weight - module.weight).abs().max() <= (1e-6 if kind == KINDS.Q4_1 else 0)
    ids, mask = padded_batch("left")
    with torch.no_grad():
        difference = (kept(ids, attention_mask=mask).logits - floating(ids, attention_mask=mask).logits).abs()
    assert (difference * mask[..., None]).max() <= 1e-3


def test_what_floats_beside_kept_integers_keeps_its_dtype(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, kinds=(KINDS.BF16, KINDS.Q8_0, KINDS.F16))
    report = convert_checkpoint(path, tmp_path / "kept", keep_integers=True)
    convert_checkpoint(path, tmp_path / "floating")
    kept, floating = CheckpointReader(tmp_path / "kept"), CheckpointReader(tmp_path / "floating")
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    file = GGUFFile(path)
    stored = {key: kinds[file.type_name(key)] for key in file.packed if file.type_name(key) in kinds}
    assert {key: kept.dtype(key) for key in stored} == stored and set(stored.values()) == set(kinds.values())
    assert all(torch.equal(kept.tensor(key).float(), floating.tensor(key)) for key in stored)
    # Loaded, and cast, is what had been all float32.
    assert (report.dtype, report.precision) == ("float32", None)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "kept").dtype == torch.float32


def test_what_has_no_form_is_dequantized(tmp_path):
    write_gguf(tmp_path / "model.gguf", kinds=(KINDS.Q5_0, KINDS.Q8_0, KINDS.F16))
    report = convert_checkpoint(tmp_path / "model.gguf", tmp_path / "kept", dtype="bfloat16", keep_integers=True)
    assert len(report.notes) == 1 and "model.embed_tokens (Q5_0)" in report.notes[0] and "(F16)" not in report.notes[0]
    reader = CheckpointReader(tmp_path / "kept")
    dtypes = {str(reader.dtype(name)) for name in reader if name.endswith("scales")}
    assert dtypes == {"torch.float16"} and reader.dtype("model.embed_tokens.weight") == torch.bfloat16
    assert any(name.endswith("values") for name in reader)


def test_constant_blocks_of_q4_1_are_exact(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, kinds=(KINDS.Q4_1,))
    packed = GGUFFile(path).packed["model.layers.1.mlp.up_proj.weight"]
    with path.open("r+b") as file:
        file.seek(packed.offset)
        file.write(np.array([0.0, 0.75], dtype=np.float16).tobytes())
    convert_checkpoint(path, tmp_path / "kept", keep_integers=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    weight = model.model.layers[1].mlp.up_proj.dense_weight()
    assert torch.equal(weight[0, :32], torch.full((32,), 0.75))


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of numpy, beside the one error
def test_scales_that_are_not_finite(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, kinds=(KINDS.Q8_0,))
    packed = GGUFFile(path).packed["model.layers.1.mlp.up_proj.weight"]
    with path.open("r+b") as file:
        file.seek(packed.offset + 34)
        file.write(np.float16("inf").tobytes())
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: holds an infinity in .*model\.gguf"):
        convert_checkpoint(path, tmp_path / "kept", keep_integers=True)
    assert os.listdir(tmp_path) == ["model.gguf"]
