"""The family is known to transformers by the .pth file alone, by an import, and, without the package, by its files."""

import json
import sys
import warnings

import pytest

import hf_llmkernel
from hf_llmkernel import registration
from hf_llmkernel.model.configuration_llm_kernel import AUTO_MAP

# Loads the folder in argv[1] by every Auto class of argv[2] and prints where the class of each comes from.
LOAD_ALL = """
import json
trust = json.loads(sys.argv[3])
import transformers
classes = {}
for name in json.loads(sys.argv[2]):
    loaded = getattr(transformers, name).from_pretrained(sys.argv[1], trust_remote_code=trust)
    classes[name] = type(loaded).__module__ + "." + type(loaded).__name__
print(json.dumps(classes))
"""


def test_start_of_python_watches_and_loads_nothing(run_python):
    code = """
print(sorted(set(sys.modules) - loaded_before))
print([name for name in ("torch", "transformers", "hf_llmkernel", "hf_llmkernel_hook") if name in sys.modules])
print(any(getattr(finder, "__name__", "") == "TransformersWatch" for finder in sys.meta_path))
"""
    assert run_python(code).split("\n")[:3] == ["[]", "[]", "True"]


def test_import_of_transformers_registers_and_loads_no_model(run_python):
    code = """
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import modeling_auto
loaded = [m for m in sys.modules if m.startswith('hf_llmkernel.model')]
assert not loaded, loaded
assert modeling_auto.__loader__ is modeling_auto.__spec__.loader
assert type(modeling_auto.__loader__).__name__ == 'SourceFileLoader'
assert 'llm_kernel' in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
assert transformers.LLMKernelForCausalLM is transformers.models.llm_kernel.LLMKernelForCausalLM
from transformers import LLMKernelForTokenClassification
"""
    run_python(code)


@pytest.mark.parametrize("trust", [None, True])
def test_installed_every_auto_class_loads_the_installed_code(run_python, tiny_checkpoint, trust):
    output = run_python(LOAD_ALL, str(tiny_checkpoint), json.dumps(sorted(AUTO_MAP)), json.dumps(trust))
    assert json.loads(output) == {
        auto: f"hf_llmkernel.model.{target}" for auto, target in AUTO_MAP.items()
    }


def test_not_installed_every_auto_class_loads_the_files_of_the_folder(run_python, tiny_checkpoint):
    arguments = (str(tiny_checkpoint), json.dumps(sorted(AUTO_MAP)), json.dumps(True))
    classes = json.loads(run_python(LOAD_ALL, *arguments, package=False))
    assert {auto: path.split(".", 1)[0] for auto, path in classes.items()} == dict.fromkeys(
        AUTO_MAP, "transformers_modules"
    )
    assert {path.rsplit(".", 1)[1] for path in classes.values()} == {
        target.rsplit(".", 1)[1] for target in AUTO_MAP.values()
    }


def test_switched_off_it_is_unknown(run_python, tiny_checkpoint):
    code = """
import transformers
try:
    transformers.AutoConfig.for_model("llm_kernel")
except ValueError as error:
    print("unknown" if "Unrecognized model identifier" in str(error) else error)
assert "hf_llmkernel" not in sys.modules
"""
    assert run_python(code, LLMKERNEL_REGISTRATION="off").strip() == "unknown"


def test_import_after_transformers_registers_the_same(run_python, tiny_checkpoint):
    code = """
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
AutoModel, AutoTokenizer, AutoModelForCausalLM._model_mapping
import hf_llmkernel
for auto in (AutoModel, AutoModelForCausalLM):
    print(type(auto.from_pretrained(sys.argv[1])).__module__)
from transformers import LLMKernelModel
"""
    output = run_python(code, str(tiny_checkpoint), LLMKERNEL_REGISTRATION="off")
    assert output.split() == ["hf_llmkernel.model.modeling_llm_kernel"] * 2


def test_pipeline_serve_and_lm_eval_take_a_folder(run_python, tiny_checkpoint):
    code = """
import transformers
tokens = transformers.pipeline("text-generation", model=sys.argv[1])("w1 w2", max_new_tokens=4, do_sample=False)
print(tokens[0]["generated_text"].startswith("w1 w2"))

from transformers.cli.serving.model_manager import ModelManager
manager = ModelManager(device="cpu")
model, tokenizer = manager.load_model_and_processor(sys.argv[1] + "@main")
print(type(model).__name__)
manager.shutdown()  # its timer would keep the process

from lm_eval.models.huggingface import HFLM
language_model = HFLM(pretrained=sys.argv[1], device="cpu", batch_size=1)
print(type(language_model.model).__name__)
"""
    output = run_python(code, str(tiny_checkpoint)).split()
    assert output[-3:] == ["True", "LLMKernelForCausalLM", "LLMKernelForCausalLM"]


def test_tokenizer_class_of_a_folder_is_kept(tiny_checkpoint, tmp_path):
    """What a converted checkpoint's tokenizer was, it stays; a folder that names none gets the general one."""
    from transformers import AutoConfig, AutoTokenizer, GPT2Tokenizer

    AutoConfig.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    GPT2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]).save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)).__name__ == "GPT2Tokenizer"

    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ == "TokenizersBackend"
    assert tokenizer("aba").input_ids == [3, 1]


def test_another_transformers_gives_a_warning_and_imports(run_python, tmp_path):
    (tmp_path / "other" / "transformers").mkdir(parents=True)
    (tmp_path / "other" / "transformers" / "__init__.py").write_text("answer = 42\n")
    code = """
import warnings
sys.path.insert(0, sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers
print(transformers.answer, len(caught), "not registered in transformers" in str(caught[0].message))
"""
    assert run_python(code, str(tmp_path / "other")).split() == ["42", "1", "True"]


def test_broken_package_gives_a_warning_and_imports(run_python, tmp_path):
    (tmp_path / "other" / "transformers").mkdir(parents=True)
    (tmp_path / "other" / "transformers" / "__init__.py").write_text("answer = 42\n")
    (tmp_path / "other" / "hf_llmkernel").mkdir()
    (tmp_path / "other" / "hf_llmkernel" / "__init__.py").write_text("raise RuntimeError('half installed')\n")
    code = """
import warnings
sys.path.insert(0, sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import transformers
print(transformers.answer, len(caught), "half installed" in str(caught[0].message))
"""
    assert run_python(code, str(tmp_path / "other")).split() == ["42", "1", "True"]


def test_tables_name_what_checkpoints_name():
    """The classes registered here and those in every checkpoint's auto_map are the same."""
    of_tables = {registration.CONFIG_CLASS, *registration.MODEL_TABLES.values()}
    of_checkpoints = {target.split(".")[1] for target in AUTO_MAP.values()}
    assert of_tables == of_checkpoints == set(registration.CLASS_MODULES)


def test_register_twice_changes_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.register()
        registration.register()
    assert sys.meta_path.count(registration.FINDER) == 1


@pytest.mark.parametrize("name", hf_llmkernel.__all__)
def test_public_names_resolve(name):
    value = getattr(hf_llmkernel, name)
    assert callable(value)
    assert name in dir(hf_llmkernel)


def test_folder_with_a_function_of_its_name_can_be_called(monkeypatch):
    import hf_llmkernel.evaluate as folder

    monkeypatch.setattr(folder, "evaluate", lambda *given, **options: (given, options))
    assert hf_llmkernel.evaluate is folder
    assert hf_llmkernel.evaluate(1, a=2) == ((1,), {"a": 2})


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_llmkernel.no_such_name
    with pytest.raises(AttributeError, match="no_such_name"):
        registration.family_class("no_such_name")

