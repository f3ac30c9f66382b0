"""What the known families' configurations mean in `LLMKernelConfig`, and back: one row of a table a family.

Reading order: the table -> a family's configuration into ours -> what stands in the way of the inverse -> the inverse.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..model.configuration_llm_kernel import LinearForm, LLMKernelConfig
from .matrices import Matrix, matrices

# Fields of the same name and meaning in every family and in ours.
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "dtype",
    "problem_type",
    "output_hidden_states",
    "return_dict",
)
# No family declares these, yet the library's shared code reads them from any of them.
UNDECLARED = ("is_causal", "classifier_dropout", "tokenizer_class")
# In a config.json without changing what the model computes: history, notes, names of the same thing in older versions.
WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "model_type",
    "num_labels",
    "pretraining_tp",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_sliding_window",
    "max_window_layers",
}
# Which of our fields may differ between families, and Llama's value of each.
SWITCHES = {"attention_bias": False, "mlp_bias": False, "qk_norm": False, "mlp_gated": True}
CONFIG_ERRORS = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError)


@dataclass(frozen=True)
class Family:
    """One stock architecture.

    Args:
        model_type: of its config.json.
        prefix: of its class names.
        own: switches that its configuration has too, under the same name.
        fixed: switches that it has built in.
        window: `"none"`, `"all"` (every layer slides, or none), or `"layers"` (some may).
    """

    model_type: str
    prefix: str
    own: tuple[str, ...] = ()
    fixed: dict[str, bool] = field(default_factory=dict)
    window: str = "none"

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return CONFIG_MAPPING[self.model_type]


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", own=("attention_bias", "mlp_bias")),
        Family("mistral", "Mistral", window="all"),
        Family("qwen2", "Qwen2", fixed={"attention_bias": True, "attention_out_bias": False}, window="layers"),
        Family("qwen3", "Qwen3", own=("attention_bias",), fixed={"qk_norm": True}, window="layers"),
    )
}


def find_family(model_type: Any, where: str) -> Family:
    """The family of a `model_type`. Raises `ValueError` listing the known ones."""
    if model_type == LLMKernelConfig.model_type:
        raise ValueError(f"{where}: is of this family already; use it as it is, export it, or pass --dequantize.")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{where}: model_type={model_type!r} is not supported; the known ones are {list(FAMILIES)}.")
    return FAMILIES[model_type]


def one_line(error: BaseException) -> str:
    """An error's text without line breaks; a missing key's without quotes, a validator's without its wrapping."""
    if isinstance(error, StrictDataclassError) and isinstance(error.__cause__, ValueError):
        error = error.__cause__
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


def parse_stock_config(fields: dict[str, Any], where: str) -> PreTrainedConfig:
    """The stock configuration of a config.json, defaults and older spellings resolved by the family's own class.

    Raises:
        ValueError: an unknown family, a quantized checkpoint, or fields that neither the class nor ours understands.
    """
    family = find_family(fields.get("model_type"), where)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        if isinstance(fields.get(name), int) and fields[name] < 1:
            raise ValueError(f"{where}: {name}={fields[name]} must be at least 1; correct this field.")
    if fields.get("quantization_config") is not None:
        method = (fields["quantization_config"] or {}).get("quant_method", "unknown")
        raise ValueError(
            f"{where}: quantization_config says the weights are quantized ({method}); convert the checkpoint that they "
            "were made from, or dequantize it first."
        )
    try:
        config = family.config_class.from_dict(copy.deepcopy(fields))
    except CONFIG_ERRORS as error:
        raise ValueError(f"{where}: {one_line(error)}; correct this field.") from None
    _check_stock(config, family, fields, where)
    return config


def _check_stock(config: PreTrainedConfig, family: Family, fields: dict[str, Any], where: str) -> None:
    if config.is_heterogeneous:
        raise ValueError(f"{where}: per_layer_config is not read by the {family.prefix} classes; remove it.")
    types = set(fields.get("layer_types") or [])
    if unknown := sorted(types - {"full_attention", "sliding_attention"}):
        raise ValueError(f"{where}: layer_types has {unknown[0]!r}; the known ones are full_ and sliding_attention.")
    if family.window != "layers" and "sliding_attention" in types:
        raise ValueError(
            f"{where}: layer_types has 'sliding_attention', which the {family.prefix} classes ignore; remove it."
        )
    rope: dict = config.rope_parameters or {}
    known = ["default", *ROPE_INIT_FUNCTIONS]
    if rope.get("rope_type") not in known:
        raise ValueError(f"{where}: rope type {rope.get('rope_type')!r} is not supported; the known ones are {known}.")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported; only 1 is.")


def fields_without_meaning(fields: dict[str, Any], config: PreTrainedConfig) -> list[str]:
    """Names in a config.json that the stock classes do not read, so that nothing carries them over."""
    declared = set(type(config)().to_dict()) | {*SHARED, *UNDECLARED, "head_dim", "id2label", "label2id"}
    return sorted(set(fields) - declared - WITHOUT_EFFECT)


def to_llm_kernel(
    config: PreTrainedConfig,
    where: str,
    forms: dict[str, LinearForm] | None = None,
    layers: Sequence[dict[str, Any]] = (),
) -> LLMKernelConfig:
    """Our configuration of a stock one. Raises `ValueError` where its values contradict each other.

    Args:
        config: of a known family.
        where: it comes from, for messages.
        forms: of matrices that are not dense, by their names without the prefix of the body.
        layers: fields that every layer has of its own, where they differ.
    """
    family = find_family(config.model_type, where)
    values = {name: getattr(config, name) for name in SHARED}
    values |= {name: getattr(config, name) for name in UNDECLARED if getattr(config, name, None) is not None}
    values |= {name: getattr(config, name) for name in family.own} | family.fixed
    values |= _labels(config)
    values["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values["attention_dropout"] = config.attention_dropout or 0.0
    values["rope_parameters"] = copy.deepcopy(config.rope_parameters)
    if family.window != "none":
        values["sliding_window"] = config.sliding_window
    if family.window == "layers":
        values["layer_types"] = list(config.layer_types)
    values |= _form_fields(forms or {}, layers or [{}] * config.num_hidden_layers)
    try:
        return LLMKernelConfig(**values)
    except CONFIG_ERRORS as error:
        raise ValueError(f"{where}: {one_line(error)}") from None


def _labels(config: PreTrainedConfig) -> dict[str, Any]:
    return {"id2label": dict(config.id2label), "label2id": dict(config.label2id or {})} if config.id2label else {}


def _form_fields(forms: dict[str, LinearForm], layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a configuration whose matrices have these forms, and its layers their own fields beside.

    What most layers share is the model's, the rest in `per_layer_config`; what is left out of a layer is its own.
    """
    layers = [{**layer, "linear_forms": dict(layer.get("linear_forms", {}))} for layer in layers]
    fields: dict[str, Any] = {}
    for path, form in forms.items():
        if path in ("embed_tokens", "lm_head"):
            fields[f"{path}_form"] = form.to_dict()
        elif int(path.split(".")[1]) < len(layers):  # one of a layer that is not there is unexpected in the file
            own = layers[int(path.split(".")[1])]["linear_forms"]
            leaf = path.rpartition(".")[2]
            own[leaf] = {**form.to_dict(), **own.get(leaf, {})}
    for name in {name: None for layer in layers for name in layer if name != "skip"}:
        values = [layer[name] for layer in layers if name in layer]
        fields[name] = max(values, key=values.count)
    per_layer = {
        index: {name: value for name, value in layer.items() if name == "skip" or value != fields[name]}
        for index, layer in enumerate(layers)
    }
    if per_layer := {index: own for index, own in per_layer.items() if own}:
        fields["per_layer_config"] = per_layer
    return fields


# What keeps the form of a matrix from being expressed, in words; `None` where nothing does.
Unfit = Callable[[Matrix], str | None]


def unfit_unless_dense(matrix: Matrix) -> str | None:
    """The rule of the stock architectures."""
    return None if matrix.form.is_dense else f"is stored {describe_form(matrix.form)}"


def obstacles(config: LLMKernelConfig, family: Family, unfit: Unfit = unfit_unless_dense) -> Iterator[str]:
    """What of a configuration a stock family cannot express: layer, and form or field."""
    own = [
        f"layer {int(index)}: {name}={value!r} is its own, and all layers of {family.model_type} are alike"
        for index, overrides in (config.to_dict().get("per_layer_config") or {}).items()
        for name, value in overrides.items()
        if name != "linear_forms"
    ]
    yield from own
    yield from _form_obstacles(config, unfit)
    if own:
        return  # a field that differs by layer cannot be read for all of them
    if config.skip:
        yield f"all layers: skip={config.skip!r} leaves out what every {family.model_type} layer has"
    yield from _switch_obstacles(config, family)
    types = config.layer_types or []
    sliding = [index for index, kind in enumerate(types) if kind == "sliding_attention"]
    if sliding and (family.window == "none" or (family.window == "all" and len(sliding) < len(types))):
        rule = "slides in no layer" if family.window == "none" else "slides in all layers or in none"
        yield f"layer {sliding[0]}: layer_types says 'sliding_attention', and {family.model_type} {rule}"


def _form_obstacles(config: LLMKernelConfig, unfit: Unfit) -> Iterator[str]:
    usual = {"embed_tokens": False, "lm_head": False}
    for index, layer in enumerate(config.per_layer_config):
        plain = copy.copy(layer)
        plain.linear_forms = {}
        usual |= {f"layer {index}, {name}": bool(plain.linear_form(name).bias) for name in layer.linear_shapes()}
    for matrix in matrices(config):
        if reason := unfit(matrix):
            yield f"{matrix.label}: {reason}"
        elif bool(matrix.form.bias) != usual[matrix.label]:
            yield f"{matrix.label}: bias={matrix.form.bias} is its own"


def describe_form(form: LinearForm) -> str:
    """A form in words: `low-rank (rank 64)`, `2:4 sparse int4`."""
    if form.rank is not None:
        return f"low-rank (rank {form.rank})"
    sparsity = {None: [], "bitmask": ["sparse (bitmask)"]}.get(form.sparsity, [f"{form.sparsity} sparse"])
    return " ".join([*sparsity, *([f"int{form.bits}"] if form.bits < 16 else [])]) or "dense"


def describe_stored(form: LinearForm) -> str:
    """A form in words, with how its integers share scales: `int4, groups of 64, zero points of uint8`."""
    if form.rank is not None or form.bits == 16:
        return describe_form(form)
    scales = f"groups of {form.group_size}" if form.group_size else "one scale a row"
    zeros = "" if form.symmetric else f", zero points of {form.zero_point_dtype}"
    return f"{describe_form(form)}, {scales}{zeros}"


def _switch_obstacles(config: LLMKernelConfig, family: Family) -> Iterator[str]:
    for name, default in SWITCHES.items():
        wanted = family.fixed.get(name, default)
        if name not in family.own and getattr(config, name) != wanted:
            yield f"all layers: {name}={getattr(config, name)}, and {family.model_type} has {wanted}"
    wanted = family.fixed.get("attention_out_bias", config.attention_bias)
    if config.attention_out_bias != wanted:
        yield f"all layers: attention_out_bias={config.attention_out_bias}, and {family.model_type} has {wanted}"


def nearest_family(config: LLMKernelConfig, unfit: Unfit) -> Family:
    """The stock family that expresses a configuration best: with fewest obstacles, the first of such."""
    return min(FAMILIES.values(), key=lambda family: len(list(obstacles(config, family, unfit))))


def refuse_obstacles(found: list[str], to: str, remedy: str) -> None:
    """Raises `ValueError` naming the first obstacle, with layer and form or field, where there is one."""
    if found:
        others = f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
        raise ValueError(f"to={to}: {found[0]}{others}; {remedy}.")


def to_stock(config: LLMKernelConfig, family: Family) -> PreTrainedConfig:
    """The stock configuration of ours, whatever the forms of its matrices.

    Raises:
        ValueError: what the family's own class refuses.
    """
    values = {name: getattr(config, name) for name in (*SHARED, *family.own, "attention_dropout")}
    usual_head_dim = config.hidden_size // config.num_attention_heads
    if config.head_dim != usual_head_dim or "head_dim" in family.config_class().to_dict():
        values["head_dim"] = config.head_dim
    values |= {name: getattr(config, name) for name in UNDECLARED if getattr(config, name, None) is not None}
    values |= _labels(config) | {"rope_parameters": copy.deepcopy(config.rope_parameters)}
    values |= _stock_window(config, family)
    try:
        return family.config_class(**values)
    except CONFIG_ERRORS as error:
        raise ValueError(f"to={family.model_type}: {one_line(error)}; export to another of {list(FAMILIES)}.") from None


def _stock_window(config: LLMKernelConfig, family: Family) -> dict[str, Any]:
    if family.window == "none":
        return {}
    types = config.layer_types or []
    window = config.sliding_window if "sliding_attention" in types else None
    if family.window == "all":
        return {"sliding_window": window}
    if window is None:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": types.index("sliding_attention"),
        "layer_types": list(types),
    }
