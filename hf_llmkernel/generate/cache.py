"""A cache of keys and values as integers: `model.generate(..., past_key_values=IntegerCache(model.config, bits=8))`.

Every head of every token has scales of its own, so that what is stored is never rounded again when tokens follow. The
tokens of a call are seen exactly by the call itself, and rounded by all that come after it; in native kernels by what
comes after a run of some hundred tokens of a prompt, and few tokens behind others see themselves rounded.

Reading order: states to integers and back -> one layer, that grows or slides -> the cache.

Shapes: B batch, N key/value heads, S cached tokens, D head_dim, G groups of a head.
"""

from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..kernels.cache import CACHES, Room, Rooms
from ..model.linear_llm_kernel import pack_nibbles, unpack_nibbles

LEVELS = {8: 255, 4: 15}


def round_states(states: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys or values as integers between the smallest and the largest value of each group of a head.

    Args:
        states: `[B, N, S, D]`.
        bits: 8 or 4.
        group_size: channels of a head that share a scale; divides D.

    Returns:
        codes, uint8 `[B, N, S, D]`, or `[B, N, S, D / 2]` of two in a byte; scales and lowest values `[B, N, S, G]`,
        in fp32 where the states are, else in their dtype.
    """
    groups = states.unflatten(-1, (-1, group_size))  # [B, N, S, G, group_size]
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high.float() - low.float()) / LEVELS[bits]).to(states.dtype)
    divisors = torch.where(scales == 0, 1, scales.float()).unsqueeze(-1)
    codes = ((groups.float() - low.float().unsqueeze(-1)) / divisors).round_().clamp_(0, LEVELS[bits])
    codes = codes.to(torch.uint8).flatten(-2)
    return pack_nibbles(codes) if bits == 4 else codes, scales, low


def restore_states(codes: torch.Tensor, scales: torch.Tensor, low: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `round_states`, `[B, N, S, D]` in the dtype of the scales."""
    codes = unpack_nibbles(codes, 2 * codes.shape[-1]) if bits == 4 else codes
    groups = codes.unflatten(-1, (scales.shape[-1], -1)).to(scales.dtype)
    return groups.mul_(scales.unsqueeze(-1)).add_(low.unsqueeze(-1)).flatten(-2)


class IntegerLayer(Rooms, DynamicLayer):
    """A layer's cache. Rooms hold a record of bytes for every head of a token: codes, scales, lowest values.

    See `llmk_cache` in kernels/native/llmkernel.h.
    """

    def __init__(self, bits: int, group_size: int):
        super().__init__()
        self.bits = bits
        self.group_size = group_size
        self.head_dim = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.head_dim = key_states.dtype, key_states.device, key_states.shape[-1]
        shape = (*key_states.shape[:2], 0, sum(self._record_bytes()))
        self.hold(*(torch.empty(shape, dtype=torch.uint8, device=self.device) for _ in self.rooms))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds new keys and values `[B, N, T, D]`; returns all of them, the new ones exact."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = [
            torch.cat((self._restored(room), states), dim=-2)
            for room, states in zip(self.rooms, (key_states, value_states), strict=True)
        ]
        self.addresses = None
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room.append(self._records(states))
        return seen[0], seen[1]

    def get_seq_length(self) -> int:
        return self.key_room.length

    def nbytes(self) -> int:
        """Bytes of what is stored, room for more left out."""
        return sum(states.nbytes for room in self.rooms if (states := room.states()) is not None)

    def reset(self) -> None:
        self.hold(None, None)
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): takes the number of tokens to remove, as a negative integer.")
        for room in self.rooms:
            room.keep_first(room.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda records: records.index_select(0, beam_idx.to(records.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda records: records.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda records: records[indices, ...])

    def offload(self) -> None:
        self._change(lambda records: records.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda records: records.to(self.device, non_blocking=True))

    def _change(self, change: Any) -> None:
        if self.is_initialized:
            keys, values = (change(room.states()) for room in self.rooms)
            self.hold(keys, values)

    def _record_bytes(self) -> list[int]:
        """Of codes, scales and lowest values."""
        groups = self.head_dim // self.group_size * self.dtype.itemsize
        return [self.head_dim * self.bits // 8, groups, groups]

    def _records(self, states: torch.Tensor) -> torch.Tensor:
        """uint8 `[B, N, T, bytes]`."""
        parts = round_states(states, self.bits, self.group_size)
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)

    def _restored(self, room: Room) -> torch.Tensor:
        """`[B, N, S, D]`."""
        records = room.states()
        assert records is not None
        codes, *others = records.split(self._record_bytes(), dim=-1)
        # Copies: where they begin in a record is seldom a place for a float.
        scales, low = (part.clone(memory_format=torch.contiguous_format).view(self.dtype) for part in others)
        return restore_states(codes, scales, low, self.bits)


class SlidingIntegerLayer(IntegerLayer):
    """The same of a layer that sees a window; between calls it holds no more than the next one can see."""

    is_sliding = True
    get_mask_sizes = DynamicSlidingWindowLayer.get_mask_sizes

    def __init__(self, sliding_window: int, bits: int, group_size: int):
        super().__init__(bits, group_size)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keeps all tokens until `crop`, which can then take some back."""
        self.record_past = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states)
        self._count(key_states.shape[-2])
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[..., -visible:, :], values[..., -visible:, :]

    def extend(self, tokens: int) -> None:
        super().extend(tokens)
        self._count(tokens)

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError("crop: tokens before the window are gone; call activate_past_recording first.")
        super().crop(tokens_to_remove)
        self.cumulative_length = max(self.cumulative_length + tokens_to_remove, 0)
        self._forget()

    def _count(self, tokens: int) -> None:
        self.cumulative_length += tokens
        if not self.record_past:
            self._forget()

    def _forget(self) -> None:
        for room in self.rooms:
            room.keep_last(max(self.sliding_window - 1, 0))


class IntegerCache(Cache):
    """Keys and values of a model as int8 or int4, for `generate(past_key_values=...)` or `forward`.

    Args:
        config: of the model; windows and skipped layers follow from it.
        bits: 8 or 4.
        group_size: channels of a head that share a scale; by default the whole head for 8 bits, and for 4 bits 32
            where that divides `head_dim`.

    Raises:
        ValueError: `bits` that are neither, or a group size that does not divide `head_dim`, or 4 bits of an odd one.
    """

    def __init__(self, config: PreTrainedConfig, bits: int = 8, group_size: int | None = None):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if bits not in LEVELS:
            raise ValueError(f"bits={bits!r}: must be 8 or 4.")
        if bits == 4 and head_dim % 2:
            raise ValueError(f"bits=4: two values share a byte, but head_dim={head_dim} is odd; take 8.")
        if group_size is None:
            group_size = 32 if bits == 4 and head_dim % 32 == 0 else head_dim
        if type(group_size) is not int or group_size < 1 or head_dim % group_size:
            raise ValueError(f"group_size={group_size!r}: must divide head_dim={head_dim}.")
        super().__init__(
            layers=[_integer_layer(layer, bits, group_size) for layer in DynamicCache(config=config).layers]
        )

    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, IntegerLayer))


CACHES.add(IntegerCache)


def _integer_layer(layer: Any, bits: int, group_size: int) -> CacheLayerMixin:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return SlidingIntegerLayer(layer.sliding_window, bits, group_size)
    if type(layer) is DynamicLayer:
        return IntegerLayer(bits, group_size)
    return layer  # of a layer without attention
