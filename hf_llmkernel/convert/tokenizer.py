"""The tokenizer of a source, such that `AutoTokenizer` gives the same ids from the converted folder."""

import json
from pathlib import Path
from typing import Any

from transformers import TOKENIZER_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from ..model.configuration_llm_kernel import LLMKernelConfig

logger = logging.get_logger(__name__)


def keep_tokenizer_class(source: Path, target: Path, config: LLMKernelConfig) -> None:
    """Names the class where the source's followed from its model type, which the converted folder no longer has.

    Files stay as they are, but for a `tokenizer_class` that the library overrules for the source's model type: there
    the copy names the class that is really used.
    """
    try:
        used = type(AutoTokenizer.from_pretrained(source, local_files_only=True)).__name__
    except Exception as error:  # a tokenizer may run any code of any package; the weights are worth having without it
        logger.warning(f"{source}: its tokenizer was copied but does not load here ({type(error).__name__}: {error}).")
        return
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    declared = settings.get("tokenizer_class")
    if declared is None:
        config.tokenizer_class = used
    elif declared.removesuffix("Fast") != used.removesuffix("Fast") and not _loads_as(target, used):
        settings["tokenizer_class"] = used
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _loads_as(folder: Path, name: str) -> bool:
    return type(AutoTokenizer.from_pretrained(folder, config=LLMKernelConfig(), local_files_only=True)).__name__ == name


def save_gguf_tokenizer(file: Path, stock: PreTrainedConfig, folder: Path) -> bool:
    """Writes the tokenizer and chat template in a GGUF file's metadata, by the class `AutoTokenizer` takes for it.

    That class is looked up here, for `AutoTokenizer` would read the whole file with the slow reader to find it out.
    """
    tokenizer_class: Any = TOKENIZER_MAPPING.get(type(stock), None)
    if tokenizer_class is None or tokenizer_class.__name__ == "MistralCommonBackend":
        tokenizer_class = PreTrainedTokenizerFast
    try:
        tokenizer = tokenizer_class.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the tokenizers package raises nothing narrower
        logger.warning(f"{file}: holds no tokenizer that could be read ({type(error).__name__}: {error}).")
        return False
    tokenizer.save_pretrained(folder)
    return True
