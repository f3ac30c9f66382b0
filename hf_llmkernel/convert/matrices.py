"""The matrices of a model of this family: embedding, linears and head, each with its form.

Shapes: O out_features, I in_features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..model.configuration_llm_kernel import ATTENTION_LINEARS, LinearForm, LLMKernelConfig


@dataclass(frozen=True)
class Matrix:
    """The embedding, a linear or the head.

    Args:
        path: its name without the prefix of the body, as in `layers.0.self_attn.q_proj`.
        label: what messages call it, as in `layer 0, q_proj`.
        form: how it is stored, its bias decided.
        shape: (O, I).
    """

    path: str
    label: str
    form: LinearForm
    shape: tuple[int, int]

    def parts(self) -> "list[Matrix]":
        """The two factors of a low-rank matrix, or itself: what is dense, sparse or integer."""
        rank = self.form.rank
        if rank is None:
            return [self]
        shapes = (rank, self.shape[1]), (self.shape[0], rank)
        named = zip("ab", self.form.factors, shapes, strict=True)
        return [Matrix(f"{self.path}.{side}", f"{self.label}.{side}", form, shape) for side, form, shape in named]


def matrices(config: LLMKernelConfig) -> Iterator[Matrix]:
    """All matrices of a causal model, those of sublayers left out excepted; a tied head is its embedding."""
    ends = (config.vocab_size, config.hidden_size)
    yield Matrix("embed_tokens", "embed_tokens", LinearForm.from_dict(config.embed_tokens_form), ends)
    for index, layer in enumerate(config.per_layer_config):
        for name, shape in layer.linear_shapes().items():
            sublayer, parent = ("attention", "self_attn") if name in ATTENTION_LINEARS else ("mlp", "mlp")
            if sublayer not in (layer.skip or []):
                path = f"layers.{index}.{parent}.{name}"
                yield Matrix(path, f"layer {index}, {name}", layer.linear_form(name), shape)
    if not config.tie_word_embeddings:
        yield Matrix("lm_head", "lm_head", LinearForm.from_dict(config.lm_head_form), ends)
