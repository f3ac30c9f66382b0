"""LoRA adapters that are served beside the model whose weights they share, against peft's own model."""

import json
import logging
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llmkernel import LLMKernelConfig, LLMKernelForCausalLM, cli
from hf_llmkernel.generate.adapters import Adapter, attach, named_adapters, own_modules
from hf_llmkernel.generate.engine import Engine, Served
from hf_llmkernel.kernels import library

from .test_serve import MODEL, Running, until

peft = pytest.importorskip("peft")
PROMPT = [4, 5, 6]


def build(intermediate_size=96, **settings):
    torch.manual_seed(5)
    config = LLMKernelConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    return LLMKernelForCausalLM(config).eval()


def save_adapter(model, folder, seed: int, targets=("q_proj", "down_proj"), **settings):
    """An adapter of random values, so that it changes what is written."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM", **settings
    )
    peft.get_peft_model(own_modules(model), config).save_pretrained(folder)
    return folder


def generated(model, ids=PROMPT, tokens=12) -> list[int]:
    prompt = torch.tensor([ids])
    output = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens
    )
    return output[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    """The tiny model without an end token, and two adapters of it."""
    root = tmp_path_factory.mktemp("adapters")
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(root / MODEL)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(root / MODEL)
    model = AutoModelForCausalLM.from_pretrained(root / MODEL)
    for seed, name in enumerate(("red", "blue")):
        save_adapter(model, root / name, seed)
    return root


FORMS = {
    "dense": {},
    "packed": {"q_proj": {"bits": 8, "group_size": 32}, "down_proj": {"bits": 4, "group_size": 32}},
    "low-rank": {"q_proj": {"rank": 8}, "down_proj": {"rank": 8}},
}


@pytest.mark.parametrize("kernels", ["off", "on"])
@pytest.mark.parametrize("name", FORMS)
def test_tokens_are_those_of_peft_and_the_base_is_left_alone(name, kernels, tmp_path, monkeypatch):
    if kernels == "on" and library.NATIVE is None:
        pytest.skip("the native library is not built: there is no compiler")
    monkeypatch.setenv("LLMKERNEL_KERNELS", kernels)
    model = build(linear_forms=FORMS[name])
    save_adapter(model, tmp_path, 1)
    before = generated(model)
    layouts = {key: module._derived for key, module in model.named_modules() if hasattr(module, "_derived")}
    adapted = attach(own_modules(model), tmp_path, "base")
    got = generated(adapted)
    assert got != before and generated(model) == before
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    for key, tensor in adapted.state_dict().items():
        assert (tensor.data_ptr() in own) != ("lora_" in key)
    if kernels == "on":  # the layouts are shared too
        for key, module in model.named_modules():
            if key in layouts:
                assert module._derived[2] is layouts[key][2]
    assert got == generated(peft.PeftModel.from_pretrained(model, str(tmp_path)))


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]}],
)
def test_kinds_of_lora(settings, tmp_path):
    model = build()
    save_adapter(model, tmp_path, 2, **settings)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for name, tensor in weights.items():
        if "lm_head" in name:
            tensor += torch.randn_like(tensor)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    before, got = generated(model), generated(attach(own_modules(model), tmp_path, "base"))
    assert got != before == generated(model)
    assert got == generated(peft.PeftModel.from_pretrained(model, str(tmp_path)))


def served(folders, *names) -> list[Served]:
    model = Served(MODEL, str(folders / MODEL))
    return [model, *named_adapters([f"{name}={folders / name}" for name in names], [model])]


def test_every_name_gets_its_own_tokens_at_the_same_time(folders):
    running = Running(Engine(served(folders, "red", "blue"), most=4), most_requests=12)
    tokenizer = AutoTokenizer.from_pretrained(folders / MODEL)
    try:
        listed = {model["id"]: model["parent"] for model in running.get("/v1/models")["data"]}
        assert listed == {MODEL: None, "red": MODEL, "blue": MODEL}
        assert running.get("/v1/models/red")["parent"] == MODEL
        expected = {}
        for name in (MODEL, "red", "blue"):
            network = AutoModelForCausalLM.from_pretrained(folders / MODEL)
            if name != MODEL:
                network = peft.PeftModel.from_pretrained(network, str(folders / name))
            ids = tokenizer("w1 w2 w3")["input_ids"]
            expected[name] = tokenizer.decode(generated(network, ids), skip_special_tokens=True)
        assert len(set(expected.values())) == 3
        got = []

        def ask(name):
            body = {"prompt": "w1 w2 w3", "max_tokens": 12}
            answer = running.post("completions", model=name, **body).json()
            got.append((name, answer["model"], answer["choices"][0]["text"]))

        threads = [threading.Thread(target=ask, args=(name,)) for name in [*expected] * 3]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert sorted(got) == sorted((name, name, text) for name, text in [*expected.items()] * 3)
        assert running.post("completions", prompt="w1", max_tokens=1).json()["model"] == MODEL
        answer = running.post("completions", model="green", prompt="w1")
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "model='green': is not served; there are tiny, red, blue"
    finally:
        running.stop()


def test_an_adapter_keeps_its_base_and_goes_first(folders):
    twin = Served("twin", str(folders / MODEL))
    models = [*served(folders, "red", "blue"), twin]
    model, red, blue, _ = models
    engine = Engine(models, budget=10**9)
    try:
        using = engine.use("red").result(30)
        engine.budget = 2 * model.bytes + red.bytes // 2
        assert engine.loaded() == [MODEL, "red"]
        assert red.bytes < model.bytes / 2  # the weights are counted once
        waiting = engine.use("twin")
        until(lambda: engine._asked)
        assert not waiting.done() and engine.loaded() == [MODEL, "red"]
        engine.release(using)
        engine.release(waiting.result(30))
        assert engine.loaded() == [MODEL, "twin"]
        engine.release(engine.use("blue").result(30))
        assert engine.loaded() == [MODEL, "blue"] and engine.counts() == (0, 0)
    finally:
        engine.stop()


def test_an_adapter_that_has_become_another_is_not_loaded(folders, tmp_path):
    shutil.copytree(folders / "red", tmp_path / "red")
    model = Served(MODEL, str(folders / MODEL))
    running = Running(Engine([model, *named_adapters([f"red={tmp_path / 'red'}"], [model])]))
    (tmp_path / "red/adapter_model.safetensors").write_bytes(b"torn")
    try:
        answer = running.post("completions", model="red", prompt="w1")
        assert answer.status_code == 503 and "cannot be read" in answer.json()["error"]["message"]
        assert running.post("completions", model=MODEL, prompt="w1", max_tokens=1).status_code == 200
        assert running.get("/health")["loaded"] == [MODEL]
    finally:
        running.stop()


def test_a_tokenizer_of_its_own_brings_its_template(folders, tmp_path):
    shutil.copytree(folders / "red", tmp_path / "red")
    tokenizer = AutoTokenizer.from_pretrained(folders / MODEL)
    tokenizer.chat_template = "{{ messages[-1]['content'] }} w9"
    tokenizer.save_pretrained(tmp_path / "red")
    model = Served(MODEL, str(folders / MODEL))
    model.load("auto", 1)
    (red,) = named_adapters([f"red={tmp_path / 'red'}"], [model])
    red.load("auto", 1)
    assert red.tokenizer.chat_template == tokenizer.chat_template != model.tokenizer.chat_template


def test_the_base_is_the_model_that_the_adapter_names_or_the_one_that_is_said(folders, tmp_path):
    shutil.copytree(folders / MODEL, tmp_path / "copy")
    models = [Served("copy", str(tmp_path / "copy")), Served(MODEL, str(folders / MODEL))]
    adapters = named_adapters([f"a={folders / 'red'}", f"b=copy:{folders / 'red'}"], models)
    assert [(adapter.name, adapter.base.name) for adapter in adapters] == [("a", MODEL), ("b", "copy")]
    assert all(type(adapter) is Adapter for adapter in adapters)


def edited(folder, copy, **settings):
    shutil.copytree(folder, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return copy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "has peft_type='IA3'; only LORA is served"),
        ({"task_type": "SEQ_CLS"}, "has task_type='SEQ_CLS'; only CAUSAL_LM"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa', which changes the base"),
        ({"bias": "all"}, "has bias='all', which is not served; merge it instead"),
        ({"alora_invocation_tokens": [3]}, r"has alora_invocation_tokens=\[3\], which is not served"),
        ({"r": 8}, r"has \[4, 64\] as .*down_proj.lora_A.weight, tiny takes \[8, 64\]"),
        ({"target_modules": ["absent"]}, "does not fit tiny .*absent"),
        ({"target_modules": ["q_proj"]}, r"down_proj.lora_A.weight, tiny takes nothing"),
        ({"base_model_name_or_path": "org/other"}, "was made for org/other, which is not served; .* red=tiny:/"),
    ],
)
def test_adapters_that_are_refused(folders, tmp_path, settings, message):
    copy = edited(folders / "red", tmp_path / "red", **settings)
    with pytest.raises(ValueError, match=message):
        named_adapters([f"red={copy}"], [Served(MODEL, str(folders / MODEL))])


def test_an_adapter_of_another_architecture_is_refused(folders, tmp_path):
    save_adapter(build(intermediate_size=128), tmp_path / "wide", 1)
    with pytest.raises(ValueError, match=r"down_proj.lora_A.weight, tiny takes .*it is another model's"):
        named_adapters([f"wide=tiny:{tmp_path / 'wide'}"], [Served(MODEL, str(folders / MODEL))])


def test_a_pickle_is_refused_by_name(folders, tmp_path):
    copy = edited(folders / "red", tmp_path / "red")
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle, which can run code"):
        named_adapters([f"red={copy}"], [Served(MODEL, str(folders / MODEL))])


def test_bad_usage_is_one_line(folders, capfd, monkeypatch):
    model, red = str(folders / MODEL), f"red={folders / 'red'}"
    for arguments, message in (
        ([model, "--adapter", "red"], "error: adapter=red: must be NAME=FOLDER or NAME=MODEL:FOLDER."),
        ([model, "--adapter", "red=/absent"], "error: adapter: /absent/adapter_config.json cannot be read"),
        ([model, "--adapter", red, "--adapter", red], f"error: adapter={red}: the name red is taken"),
        ([model, "--adapter", f"tiny={folders / 'red'}"], "error: adapter=tiny="),
        ([model, model], "error: MODEL="),
    ):
        assert cli.main(["serve", *arguments]) == 2
        lines = capfd.readouterr().err.splitlines()
        assert lines[-1].startswith(message), lines
    monkeypatch.setattr("hf_llmkernel.generate.adapters.is_peft_available", lambda: False)
    assert cli.main(["serve", model, "--adapter", red]) == 2
    assert "pip install 'hf_llmkernel[peft]'" in capfd.readouterr().err


def test_what_bitsandbytes_asks_for_as_peft_imports_it_is_not_said(tmp_path, caplog):
    """By the logger that asks, on a processor with AVX512-BF16; all else that it says is heard."""
    with pytest.raises(ValueError, match="cannot be read"):
        attach(None, tmp_path, MODEL)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "No module")
    logger.warning("something else")
    assert caplog.messages == ["something else"]
