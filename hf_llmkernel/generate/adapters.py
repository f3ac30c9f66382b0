"""LoRA adapters of a served model: each is a tree of modules of its own over the model's weights, which are not copied.

They are not merged: native steps take an adapter beside its linear, which costs little, while a merged copy would take
the base's memory again for each adapter, and round again where the base holds integers.

Reading order: what `--adapter` says -> an adapter that is served -> its folder -> attached to a model.
"""

import copy
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_peft_available

from .engine import Served

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Settings that an adapter may have; in all others it must be as peft's defaults are, which leave the base as it is.
SETTINGS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# peft imports bitsandbytes, which on a processor with AVX512-BF16 asks for a package that no adapter here needs.
HINTING, HINT = "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"
INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")  # of the others some write into the base's weights


def named_adapters(asked: Sequence[str], models: Sequence[Served]) -> "list[Adapter]":
    """The adapters of `--adapter` on the models that are served.

    Args:
        asked: `NAME=FOLDER`, on the model that the adapter was made for, or `NAME=MODEL:FOLDER`, MODEL the name of one.

    Raises:
        ValueError: another form, a name that is taken, a model that is not served, an adapter that is none or does not
            fit, or peft is not installed.
    """
    if asked and not is_peft_available():
        raise ValueError("adapter: peft is not installed; pip install 'hf_llmkernel[peft]'.")
    names, adapters = [model.name for model in models], []
    for text in asked:
        name, equals, place = text.partition("=")
        if not (name and equals and place):
            raise ValueError(f"adapter={text}: must be NAME=FOLDER or NAME=MODEL:FOLDER.")
        if name in names:
            raise ValueError(f"adapter={text}: the name {name} is taken; choose another.")
        names.append(name)
        named = next((model for model in models if place.startswith(f"{model.name}:")), None)
        folder = Path(place if named is None else place.removeprefix(f"{named.name}:")).expanduser()
        recorded = read_settings(folder).get("base_model_name_or_path")
        base = named or next((model for model in models if model.is_of(recorded)), None)
        if base is None:
            raise ValueError(
                f"adapter={text}: was made for {recorded}, which is not served; say which model takes it, as in "
                f"{name}={models[0].name}:{folder}."
            )
        adapters.append(Adapter(name, folder, base))
    return adapters


class Adapter(Served):
    """An adapter that is served as a model of its own name, loaded after its base and let go before it.

    Raises:
        ValueError: no LoRA adapter in safetensors, one that needs more than this, or one that does not fit the base.
    """

    def __init__(self, name: str, folder: Path, base: Served):
        self.name, self.source, self.folder, self.base = name, str(folder), folder, base
        self.bytes = (folder / WEIGHTS).stat().st_size if (folder / WEIGHTS).is_file() else 0
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.folder))
        attach(network, folder, base.name)

    def _read(self, dtype: str) -> tuple[Any, Any]:
        assert self.base is not None and self.base.network is not None
        network = attach(own_modules(self.base.network), self.folder, self.base.name)
        own = (self.folder / "tokenizer_config.json").is_file()  # as where a chat template came with the training
        return network, AutoTokenizer.from_pretrained(self.folder) if own else self.base.tokenizer


def read_settings(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a LoRA adapter. Raises `ValueError` for a folder without, or with what is not served."""
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"adapter: {path} cannot be read ({error}); give the folder of a peft adapter.") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise ValueError(f"adapter: {path} has peft_type={kind!r}; only LORA is served.")
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"adapter: {path} has task_type={settings['task_type']!r}; only CAUSAL_LM is served.")
    if settings.get("init_lora_weights", True) not in INITIALIZATIONS:
        raise ValueError(
            f"adapter: {path} has init_lora_weights={settings['init_lora_weights']!r}, which changes the base; save it "
            "as a plain LoRA (peft's path_initial_model_for_weight_conversion)."
        )
    return settings


def check_settings(folder: Path, settings: dict[str, Any], defaults: Any) -> None:
    """Raises `ValueError` for a setting that is neither a plain LoRA's nor peft's default."""
    plain = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
    for name, value in settings.items():
        if value and name not in SETTINGS and value != plain.get(name):
            raise ValueError(f"adapter: {folder / CONFIG} has {name}={value!r}, which is not served; merge it instead.")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Raises `ValueError` where there are none, damaged ones, or a pickle's."""
    path = folder / WEIGHTS
    if not path.is_file() and (folder / PICKLE).is_file():
        raise ValueError(
            f"adapter: {folder / PICKLE} is a pickle, which can run code and is not read; save it as safetensors."
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"adapter: {path} cannot be read ({error}); write it again.") from None


def own_modules(network: Any) -> Any:
    """A copy of a model whose tensors, and whose modules that hold nothing else, are the model's own."""
    leaves = [module for module in network.modules() if module._parameters and not module._modules]
    shared = [*leaves, *network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(part): part for part in shared})


def attach(network: Any, folder: Path, base: str) -> Any:
    """The model with a LoRA adapter beside its linears, which are left as they are.

    Args:
        network: is changed; on the meta device only whether it fits is looked at.
        folder: of the adapter.
        base: the model's name, for messages.

    Raises:
        ValueError: an adapter that cannot be read, or whose tensors are not those that the model takes.
    """
    logging.getLogger(HINTING).addFilter(_is_no_hint)
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    check_settings(folder, read_settings(folder), LoraConfig())
    stored = read_weights(folder)
    try:
        adapted = PeftModel(network, LoraConfig.from_pretrained(str(folder)))
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"adapter: {folder} does not fit {base} ({' '.join(str(error).split())}).") from None
    taken = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name in sorted(taken.keys() | stored.keys()):
        has, takes = (list(tensors[name].shape) if name in tensors else "nothing" for tensors in (stored, taken))
        if has != takes:
            raise ValueError(f"adapter: {folder} has {has} as {name}, {base} takes {takes}; it is another model's.")
    if network.device.type != "meta":
        # Neither by load_state_dict() nor by eval(), which would have packed linears forget their layouts.
        for name, tensor in stored.items():
            taken[name].copy_(tensor)
        for module in network.modules():
            module.training = False
    return network


def _is_no_hint(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(HINT)
