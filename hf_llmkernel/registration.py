"""Makes transformers know the family by name: AutoConfig, every Auto model class, pipelines, `transformers serve`.

transformers has no plug-in discovery, but its Auto classes resolve names lazily: a table says that `model_type` "x" has
class "XForCausalLM", and `transformers.models.x` is imported when that is asked for. This module adds the family's
names to these tables as soon as transformers has made them, and serves `transformers.models.llm_kernel` as a module
whose attributes come from `hf_llmkernel.model`. Nothing of torch or of the model is imported before a checkpoint of the
family is opened.

`register()` runs on `import hf_llmkernel`, before or after transformers; an installed `.pth` file (see `startup/`)
makes Python do that import when a program first imports transformers.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

MODEL_TYPE = "llm_kernel"
FAMILY_MODULE = f"transformers.models.{MODEL_TYPE}"
CONFIG_CLASS = "LLMKernelConfig"

CLASS_MODULES = {
    "LLMKernelConfig": "hf_llmkernel.model.configuration_llm_kernel",
    "LLMKernelModel": "hf_llmkernel.model.modeling_llm_kernel",
    "LLMKernelForCausalLM": "hf_llmkernel.model.modeling_llm_kernel",
    "LLMKernelForSequenceClassification": "hf_llmkernel.model.modeling_llm_kernel",
    "LLMKernelForTokenClassification": "hf_llmkernel.model.modeling_llm_kernel",
    "LLMKernelForQuestionAnswering": "hf_llmkernel.model.modeling_llm_kernel",
}

MODEL_TABLES = {
    "MODEL_MAPPING_NAMES": "LLMKernelModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "LLMKernelForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "LLMKernelForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "LLMKernelForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "LLMKernelForQuestionAnswering",
}


def register() -> None:
    """Registers the family with transformers, whether or not it is imported already. Idempotent, imports nothing."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
    for name in ADDITIONS:
        if name in sys.modules:
            add_names(name)


# The classes below do without the bases of importlib.abc, whose import would slow every program's start.
class FamilyFinder:
    """Finds `transformers.models.llm_kernel`, and adds the family's names to the modules of `ADDITIONS` on import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == FAMILY_MODULE:
            return ModuleSpec(fullname, cast(Any, FamilyLoader()), origin="hf_llmkernel.model")
        if fullname not in ADDITIONS:
            return None
        spec = self._spec_of_others(fullname, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = cast(Any, AddingLoader(spec.loader))
        return spec

    def _spec_of_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class FamilyLoader:
    """Makes the module `transformers.models.llm_kernel`: the family's classes, each imported when asked for."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(__getattr__=family_class, __dir__=lambda: sorted(CLASS_MODULES), __all__=[*CLASS_MODULES])


class AddingLoader:
    """A module's own loader, then the family's names. Replaced by that loader before anything can look at it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        add_names(module.__name__)


def family_class(name: str) -> type:
    """One class of the family by name. Raises `AttributeError` on any other name, as a module does."""
    if name not in CLASS_MODULES:
        raise AttributeError(f"module {FAMILY_MODULE!r} has no attribute {name!r}")
    return getattr(importlib.import_module(CLASS_MODULES[name]), name)


def add_names(module_name: str) -> None:
    """Adds the family to one module of transformers; a version with other tables gets a warning, not an error."""
    try:
        # transformers puts another object in the place of its module, hence by name.
        ADDITIONS[module_name](sys.modules[module_name])
    except Exception as error:
        warnings.warn(
            f"hf_llmkernel is not registered in {module_name}: {error!r}; load its checkpoints with "
            "trust_remote_code=True, or install a transformers version that its pyproject.toml names.",
            stacklevel=2,
        )


def _add_to_transformers(module: ModuleType) -> None:
    # `transformers serve` looks the architecture up on the top module.
    for name in CLASS_MODULES:
        module._class_to_module.setdefault(name, FAMILY_MODULE.partition(".")[2])


def _add_to_second_copy(module: ModuleType) -> None:
    # transformers.processing_utils runs transformers' own __init__ a second time, past every finder, and leaves the
    # second copy in sys.modules.
    _add_to_transformers(sys.modules["transformers"])


def _add_to_configurations(module: ModuleType) -> None:
    module.CONFIG_MAPPING_NAMES.setdefault(MODEL_TYPE, CONFIG_CLASS)


def _add_to_models(module: ModuleType) -> None:
    for table, name in MODEL_TABLES.items():
        getattr(module, table).setdefault(MODEL_TYPE, name)
    # Mappings made before the configuration was named have to learn it.
    for mapping in list(vars(module).values()):
        if hasattr(mapping, "_reverse_config_mapping"):
            mapping._reverse_config_mapping.setdefault(CONFIG_CLASS, MODEL_TYPE)


ADDITIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers": _add_to_transformers,
    "transformers.processing_utils": _add_to_second_copy,
    "transformers.models.auto.configuration_auto": _add_to_configurations,
    "transformers.models.auto.modeling_auto": _add_to_models,
}
FINDER = FamilyFinder()
