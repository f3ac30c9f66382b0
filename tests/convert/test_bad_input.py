"""Every fault of a source or a machine: one clear error, nothing half-written, the source untouched."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_llmkernel.cli import main
from hf_llmkernel.convert import convert_checkpoint

from .sources import edit_config, hashes, save_stock

INDEX = "model.safetensors.index.json"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], shard: int = 0) -> str:
    """Applies a change to the tensors of one shard and gives its name."""
    path = shards(folder)[shard]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path.name


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def truncate(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def to_pickle(folder: Path) -> None:
    for path in [*shards(folder), folder / INDEX]:
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def poison(value: float, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = sorted(tensors)[0]
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-1] = value

    return change


def keep_only(names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for shard in range(len(shards(folder))):
            rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if names not in key], shard)
        keys = {key: path.name for path in shards(folder) for key in load_file(path)}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": keys}))

    return change


QUANTIZED = {"quant_method": "awq", "bits": 4}
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: shards(f)[1].unlink(), r"model-00002-of-\d+\.safetensors: missing, .*fetch this shard"),
    "truncated shard": (lambda f: truncate(shards(f)[1], 4), r"model-00002-of-\S+: truncated, \d+ bytes of \d+"),
    "shard cut in its header": (lambda f: os.truncate(shards(f)[0], 100), r"model-00001-of-.*its start; fetch"),
    "empty shard": (lambda f: os.truncate(shards(f)[0], 0), r"model-00001-of-.*: 0 bytes are no safetensors file"),
    "a large file's pointer": (
        lambda f: shards(f)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        r"model-00001-of-.*pointer of Git LFS.*; fetch",
    ),
    "header that is no JSON": (
        lambda f: shards(f)[0].write_bytes((16).to_bytes(8, "little") + b"not JSON at all " + bytes(100)),
        r"model-00001-of-.*: damaged header, it is not JSON; fetch",
    ),
    "trailing bytes": (lambda f: shards(f)[0].open("ab").write(b"xx"), r"model-00001-of-.*: 2 bytes beyond its last"),
    "index of another checkpoint": (
        lambda f: edit_index(f, lambda keys: keys.update({"model.layers.9.mlp.x.weight": keys["lm_head.weight"]})),
        r"model\.layers\.9\.mlp\.x\.weight: model\.safetensors\.index\.json puts it in .*, which lacks it",
    ),
    "index that is damaged": (lambda f: (f / INDEX).write_text("{"), r"index\.json: damaged, .*fetch this file again"),
    "index that leaves the folder": (
        lambda f: edit_index(f, lambda keys: keys.update({"lm_head.weight": "../other/model.safetensors"})),
        r"names the file '\.\./other/model\.safetensors' outside",
    ),
    "key in two shards": (
        lambda f: (
            rewrite(f, lambda tensors: tensors.update({"lm_head.weight": torch.ones(97, 48)}), -1)
            and rewrite(f, lambda tensors: tensors.update({"lm_head.weight": torch.ones(97, 48)}), -2)
        ),
        r"lm_head\.weight: both model-\S+ and model-\S+ in .* hold it",
    ),
    "only pickles": (to_pickle, r"pytorch_model\.bin .*convert to safetensors first: load it with from_pretrained"),
    "shards without index": (lambda f: (f / INDEX).unlink(), r"has model-00001-of-\S+ but no model\.\S+\.index"),
    "no weights": (lambda f: [path.unlink() for path in [*shards(f), f / INDEX]], r"has neither model\."),
    "NaN": (lambda f: rewrite(f, poison(float("nan"))), r"\S+\.weight: holds NaN in .*model-00001-of-\S+; .*use "),
    "infinity": (lambda f: rewrite(f, poison(-float("inf")), -1), r"\S+\.weight: holds an infinity in .*model-\d+-of-"),
    "bfloat16 NaN": (lambda f: rewrite(f, poison(float("nan"), torch.bfloat16)), r"\S+\.weight: holds NaN in"),
    "missing tensors": (
        keep_only("layers.0"),
        r"model\.embed_tokens\.weight and \d+ more: missing in the source, .*fetch all of its shards",
    ),
    "unexpected tensor": (
        lambda f: rewrite(f, lambda tensors: tensors.update({"model.layers.0.mlp.experts.0.w1.weight": torch.ones(2)})),
        r"model\.layers\.0\.mlp\.experts\.0\.w1\.weight: unexpected in .*model-00001-of",
    ),
    "biases the config does not have": (
        lambda f: rewrite(f, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(48)})),
        r"model\.layers\.1\.self_attn\.q_proj\.bias: unexpected in",
    ),
    "config with another width": (
        lambda f: edit_config(f, intermediate_size=96),
        r"mlp\.\w+\.weight: shape \[\S+ \S+\] in .*safetensors, but .*config\.json makes it \[\S+ \S+\]; use",
    ),
    "config with another vocabulary": (
        lambda f: edit_config(f, vocab_size=98),
        r"(lm_head|model\.embed_tokens)\.weight: shape \[97, 48\] in .* makes it \[98, 48\]",
    ),
    "config with other key heads": (
        lambda f: edit_config(f, num_key_value_heads=3),
        r"k_proj\.weight: shape \[16, 48\] .* makes it \[24, 48\]",
    ),
    "config with more layers": (lambda f: edit_config(f, num_hidden_layers=4), r"model\.layers\.3\.\S+ and \d+ more"),
    "config with fewer layers": (lambda f: edit_config(f, num_hidden_layers=2), r"layers\.2\.\S+: unexpected in"),
    "no config": (lambda f: (f / "config.json").unlink(), r"source=.*: has no config\.json and no GGUF file"),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: is not valid JSON"),
    "unsupported family": (
        lambda f: edit_config(f, model_type="gpt_neox"),
        r"model_type='gpt_neox' is not supported; the known ones are \['llama', 'mistral', 'qwen2', 'qwen3'\]",
    ),
    "a family without a name": (lambda f: edit_config(f, model_type=...), r"model_type=None is not supported"),
    "own family": (lambda f: edit_config(f, model_type="llm_kernel"), r"is of this family already"),
    "unsupported class": (
        lambda f: edit_config(f, architectures=["LlamaForImages"]),
        r"architectures=\['LlamaForImages'\] has no counterpart here; the known classes are \['LlamaModel', ",
    ),
    "quantized source": (
        lambda f: edit_config(f, quantization_config=QUANTIZED),
        r"quantization_config says the weights are quantized \(awq\); convert the checkpoint",
    ),
    "quantized tensor": (
        lambda f: rewrite(f, lambda tensors: tensors.update({"lm_head.weight": torch.ones(97, 48).char()}), -1),
        r"lm_head\.weight: is int8 in .*model-\S+, so the source is quantized; dequantize it first",
    ),
    "unknown rope type": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "wavy", "rope_theta": 1e4}),
        r"rope type 'wavy' is not supported; the known ones are \['default', 'linear', ",
    ),
    "rope without its factor": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        r"config\.json: .*factor",
    ),
    "partial rotation": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        r"partial_rotary_factor=0\.5 is not supported",
    ),
    "heads that do not divide": (lambda f: edit_config(f, num_attention_heads=5), r"config\.json: .*attention heads? "),
    "no heads": (
        lambda f: edit_config(f, num_attention_heads=0),
        r"config\.json: num_attention_heads=0 must be at least",
    ),
    "fewer than no layers": (
        lambda f: edit_config(f, num_hidden_layers=-1),
        r"config\.json: num_hidden_layers=-1 must be at least 1",
    ),
    "a family that is no name": (lambda f: edit_config(f, model_type=["llama"]), r"model_type=\['llama'\] is not supp"),
    "a field of the wrong type": (lambda f: edit_config(f, hidden_size="wide"), r"config\.json: .*hidden_size"),
    "unknown activation": (
        lambda f: edit_config(f, hidden_act="gelu_of_mine"),
        r"config\.json: hidden_act='gelu_of_mine' is not",
    ),
    "layer types that its class ignores": (
        lambda f: edit_config(f, layer_types=["sliding_attention"] * 3),
        r"layer_types has 'sliding_attention', which the Llama classes ignore",
    ),
    "layers of an unknown kind": (
        lambda f: edit_config(f, layer_types=["full_attention", "chunked_attention", "full_attention"]),
        r"layer_types has 'chunked_attention'; the known ones are",
    ),
    "layers that differ": (
        lambda f: edit_config(f, per_layer_config={"1": {"intermediate_size": 64}}),
        r"per_layer_config is not read by the Llama classes",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "source"
    save_stock(folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_source(tmp_path, sound, fault, capfd):
    break_it, message = FAULTS[fault]
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(sound, source)
    break_it(source)
    before = hashes(source)
    with pytest.raises(ValueError, match=message) as raised:
        convert_checkpoint(source, output)
    assert "\n" not in str(raised.value)
    assert hashes(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    capfd.readouterr()
    assert main(["convert", str(source), str(output)]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {raised.value}"]
    assert hashes(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


BAD_OPTIONS = {
    "head": ({"head": "masked-lm"}, r"head='masked-lm': is not one of \['base', "),
    "dtype": ({"dtype": "int8"}, r"dtype=int8: is not one of \['float32', 'bfloat16', 'float16'\]"),
    "head without tensors": ({"head": "token-classification"}, r"score\.weight and 1 more: missing"),
    "gguf_file": ({"gguf_file": "x.gguf"}, r"gguf_file=x\.gguf: not in .*; the GGUF files there are \[\]"),
    "shard_bytes": ({"shard_bytes": 0}, r"shard_bytes=0: must be at least 1"),
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_options(tmp_path, sound, option):
    options, message = BAD_OPTIONS[option]
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(sound, tmp_path / "output", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "version https://git-lfs.github.com/spec/v1"])
def test_a_companion_that_is_no_json_object_is_named(tmp_path, name, content):
    source = tmp_path / "source"
    save_stock(source)
    (source / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: is no.*JSON.*fetch this file again"):
        convert_checkpoint(source, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_cast_that_overflows(tmp_path, sound):
    source = tmp_path / "source"
    shutil.copytree(sound, source)
    rewrite(source, poison(1e5))
    with pytest.raises(ValueError, match=r"dtype=float16: \S+\.weight in .* beyond its range; choose bfloat16"):
        convert_checkpoint(source, tmp_path / "output", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert convert_checkpoint(source, tmp_path / "output", dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("source", ["no/such/folder", "./missing", "/no/such/folder"])
def test_a_source_that_is_not_there(tmp_path, monkeypatch, source):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=f"source={source}: is neither a folder, a .gguf file nor a Hub id; check"):
        convert_checkpoint(source, tmp_path / "output")
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_a_file(tmp_path, sound):
    with pytest.raises(ValueError, match=r"config\.json: is a file, but no \.gguf; give the folder"):
        convert_checkpoint(sound / "config.json", tmp_path / "output")


def test_an_output_in_the_way_stays_as_it_is(tmp_path, sound, capfd):
    (tmp_path / "output").mkdir()
    (tmp_path / "output/mine").write_text("precious")
    with pytest.raises(ValueError, match=r"output=.*: exists and is not empty; choose another folder or remove it"):
        convert_checkpoint(sound, tmp_path / "output")
    assert main(["convert", str(sound), str(tmp_path / "output")]) == 2
    assert hashes(tmp_path) == hashes(tmp_path) and (tmp_path / "output/mine").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output"]


def test_the_source_is_never_the_output(tmp_path, sound):
    source = tmp_path / "source"
    shutil.copytree(sound, source)
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert_checkpoint(source, source)
    assert hashes(source) == hashes(sound)


def test_a_full_disk_is_found_out_before_the_first_byte(tmp_path, sound, monkeypatch, capfd):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match="not enough disk space") as raised:
        convert_checkpoint(sound, tmp_path / "output")
    assert raised.value.errno == errno.ENOSPC
    assert main(["convert", str(sound), str(tmp_path / "output")]) == 1
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not list(tmp_path.iterdir())


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_a_write_that_fails_midway_leaves_nothing(tmp_path, sound):
    """The kernel refuses to let a file grow, as it does when the disk fills up while others write too."""
    before = hashes(sound)
    code = """
        import resource, sys
        from hf_llmkernel.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        sys.exit(main(["convert", sys.argv[1], sys.argv[2]]))
    """
    ended = run_python(code, sound, tmp_path / "output")
    assert ended.returncode == 1, ended.stderr
    assert [line[:7] for line in ended.stderr.splitlines() if "error" in line] == ["error: "]
    assert not list(tmp_path.iterdir())
    assert hashes(sound) == before


def test_a_killed_run_leaves_only_what_the_next_one_clears(tmp_path, sound):
    code = """
        import os, signal, sys
        from hf_llmkernel import checkpoint
        from hf_llmkernel.convert import convert_checkpoint
        add_blocks = checkpoint.CheckpointWriter.add_blocks
        def add_and_die(self, name, *rest):
            add_blocks(self, name, *rest)
            if name == "model.norm.weight":
                os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.CheckpointWriter.add_blocks = add_and_die
        convert_checkpoint(sys.argv[1], sys.argv[2])
    """
    before = hashes(sound)
    assert run_python(code, sound, tmp_path / "output").returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["output.part"]
    assert hashes(sound) == before
    convert_checkpoint(sound, tmp_path / "output")
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert not [name for name in hashes(tmp_path / "output") if "part" in name]
