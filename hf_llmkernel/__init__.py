"""Hugging Face language models in every compressed form, from conversion to measured speed.

`import hf_llmkernel` registers the family with transformers; everything else is imported when it is first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_llmkernel.registration import CLASS_MODULES, register

if TYPE_CHECKING:
    from hf_llmkernel.compress import Recipe, compress
    from hf_llmkernel.compress.optimum import LLMKernelPruner, LLMKernelPruningConfig
    from hf_llmkernel.compress.optimum_quantize import LLMKernelQuantizationConfig, LLMKernelQuantizer
    from hf_llmkernel.compress.sparsify.gradual import GradualPruning, pack_zeros
    from hf_llmkernel.convert import convert_checkpoint, export_checkpoint
    from hf_llmkernel.evaluate import Report, evaluate, inspect
    from hf_llmkernel.generate.cache import IntegerCache
    from hf_llmkernel.generate.paging import load_paged
    from hf_llmkernel.model.configuration_llm_kernel import LinearForm, LLMKernelConfig
    from hf_llmkernel.model.modeling_llm_kernel import (
        LLMKernelForCausalLM,
        LLMKernelForQuestionAnswering,
        LLMKernelForSequenceClassification,
        LLMKernelForTokenClassification,
        LLMKernelModel,
    )
    from hf_llmkernel.presets import preset_config

__version__ = "0.1.0"
__all__ = [
    "GradualPruning",
    "IntegerCache",
    "LLMKernelConfig",
    "LLMKernelForCausalLM",
    "LLMKernelForQuestionAnswering",
    "LLMKernelForSequenceClassification",
    "LLMKernelForTokenClassification",
    "LLMKernelModel",
    "LLMKernelPruner",
    "LLMKernelPruningConfig",
    "LLMKernelQuantizationConfig",
    "LLMKernelQuantizer",
    "LinearForm",
    "Recipe",
    "Report",
    "compress",
    "convert_checkpoint",
    "evaluate",
    "export_checkpoint",
    "inspect",
    "load_paged",
    "pack_zeros",
    "preset_config",
]

_MODULE_OF = {
    **CLASS_MODULES,
    "LinearForm": "hf_llmkernel.model.configuration_llm_kernel",
    "GradualPruning": "hf_llmkernel.compress.sparsify.gradual",
    "pack_zeros": "hf_llmkernel.compress.sparsify.gradual",
    "compress": "hf_llmkernel.compress",
    "Recipe": "hf_llmkernel.compress",
    "convert_checkpoint": "hf_llmkernel.convert",
    "export_checkpoint": "hf_llmkernel.convert",
    "evaluate": "hf_llmkernel.evaluate",
    "inspect": "hf_llmkernel.evaluate",
    "Report": "hf_llmkernel.evaluate",
    "preset_config": "hf_llmkernel.presets",
    "IntegerCache": "hf_llmkernel.generate.cache",
    "load_paged": "hf_llmkernel.generate.paging",
    "LLMKernelPruner": "hf_llmkernel.compress.optimum",
    "LLMKernelPruningConfig": "hf_llmkernel.compress.optimum",
    "LLMKernelQuantizationConfig": "hf_llmkernel.compress.optimum_quantize",
    "LLMKernelQuantizer": "hf_llmkernel.compress.optimum_quantize",
}


class _VerbFolder(ModuleType):
    """A folder that has a public function of its own name: calling the folder calls the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """This package. Python binds a folder to its name here on import, over a function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _MODULE_OF and isinstance(value, ModuleType):
            value.__class__ = _VerbFolder
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_MODULE_OF[name])
    # The name of a folder stands for the folder, which can be called.
    return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
register()
