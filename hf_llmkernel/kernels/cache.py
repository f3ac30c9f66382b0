"""Cache layers that a native step writes into: transformers' dynamic layers, with room for tokens to come.

A step replaces the layers of a `DynamicCache` by these. They are what they replace to everyone else, `keys` and
`values` included, but a new token is written behind the others instead of copying all of them.

Shapes: B batch, N key/value heads, S cached tokens, C tokens there is room for, D head_dim.
"""

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)

from .library import TYPES

LEAST_ROOM = 128
CACHES: set[type] = {DynamicCache, StaticCache, Cache}  # whose layers alone say what a native call may write


class Room:
    """Keys or values as the first, or the last, of what a larger tensor has room for."""

    def __init__(self) -> None:
        self.tensor: torch.Tensor | None = None  # [B, N, C, D]
        self.begin = 0
        self.length = 0

    def hold(self, states: torch.Tensor | None) -> None:
        """Takes states `[B, N, S, D]` as they are, without room; also `None` and transformers' empty tensor `[0]`."""
        self.tensor, self.begin = states, 0
        self.length = states.shape[-2] if states is not None and states.dim() == 4 else 0

    def states(self) -> torch.Tensor | None:
        if self.tensor is None or self.tensor.dim() != 4:
            return self.tensor
        return self.tensor[:, :, self.begin : self.begin + self.length]

    def make(self, tokens: int) -> None:
        """Room for more tokens, of which there is some already or the tensor becomes a larger one."""
        assert self.tensor is not None
        if self.begin + self.length + tokens <= self.tensor.shape[2] and self.tensor.is_contiguous():
            return
        batch, heads, _, head_dim = self.tensor.shape
        capacity = self.length + max(self.length // 2, tokens + LEAST_ROOM)
        larger = self.tensor.new_empty(batch, heads, capacity, head_dim)
        larger[:, :, : self.length] = self.tensor[:, :, self.begin : self.begin + self.length]
        self.tensor, self.begin = larger, 0

    def append(self, states: torch.Tensor) -> None:
        """Adds `[B, N, T, D]` behind the others."""
        self.make(states.shape[2])
        assert self.tensor is not None
        end = self.begin + self.length
        self.tensor[:, :, end : end + states.shape[2]] = states
        self.length += states.shape[2]

    def keep_first(self, tokens: int) -> None:
        self.length = max(tokens, 0)

    def keep_last(self, tokens: int) -> None:
        gone = max(self.length - tokens, 0)
        self.begin += gone
        self.length -= gone


class Rooms:
    """The rooms of a layer's keys and values, which a native call writes into.

    Attributes:
        bits: 0 where states are floating; else what the rooms hold are records of integers, `[B, N, C, bytes]`.
        group_size: of integers, channels that share a scale.
    """

    bits = 0
    group_size = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.key_room, self.value_room = Room(), Room()
        self.addresses: tuple[Any, ...] | None = None  # of the rooms' tensors and their strides, while they are these
        super().__init__(*args, **kwargs)

    @property
    def rooms(self) -> tuple[Room, Room]:
        return self.key_room, self.value_room

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "addresses": None}

    def hold(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """Takes what the rooms shall hold, without room for more."""
        self.addresses = None
        self.key_room.hold(keys)
        self.value_room.hold(values)

    def extend(self, tokens: int) -> None:
        """Counts tokens that a native call has written."""
        for room in self.rooms:
            room.length += tokens

    def place(self, tokens: int, shape: tuple[int, int, int]) -> tuple[int, ...] | None:
        """Where a native call finds all this and writes the next tokens: `llmk_cache`, its mask offset left 0.

        `None` where there is nothing yet, or nothing that it can write into, or states of another shape than B, N, D.
        """
        room = self.key_room
        places = self.addresses
        if places is None or room.begin + room.length + tokens > places[-1]:
            places = self.addresses = self._make_room(tokens)
        if places is None or places[-2] != shape:
            return None
        keys, values, batch, head, token, kind, size, *_ = places
        offset = room.begin * token * size
        return keys + offset, values + offset, batch, head, token, room.length, 0, kind, self.bits, self.group_size

    def _make_room(self, tokens: int) -> tuple[Any, ...] | None:
        states, others = (room.states() for room in self.rooms)
        if states is None or others is None or states.dim() != 4:
            return None
        if states.shape != others.shape or states.dtype != others.dtype or self.key_room.begin != self.value_room.begin:
            return None
        dtype = getattr(self, "dtype", None) if self.bits else states.dtype
        if self.bits == 4 and self.group_size % 2:  # a byte would belong to two groups
            return None
        if states.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
            return None
        for room in self.rooms:
            room.make(tokens)
        keys, values = self.key_room.tensor, self.value_room.tensor
        assert keys is not None and values is not None
        batch, head, token, _ = keys.stride()
        shape = (*keys.shape[:2], getattr(self, "head_dim", 0) if self.bits else keys.shape[3])
        kind, size = TYPES[dtype], keys.element_size()
        return keys.data_ptr(), values.data_ptr(), batch, head, token, kind, size, shape, keys.shape[2]


class _RoomyStates(Rooms):
    """`keys` and `values` of a layer as properties over the two rooms."""

    @property
    def keys(self) -> torch.Tensor | None:
        return self.key_room.states()

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self.addresses = None
        self.key_room.hold(states)

    @property
    def values(self) -> torch.Tensor | None:
        return self.value_room.states()

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self.addresses = None
        self.value_room.hold(states)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.addresses = None
        for room in self.rooms:
            if room.length:
                assert room.tensor is not None
                room.tensor = room.tensor.index_select(0, beam_idx.to(room.tensor.device))


class RoomyLayer(_RoomyStates, DynamicLayer):
    """A `DynamicLayer` with room."""

    def get_seq_length(self) -> int:
        return self.key_room.length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # which says what is wrong
        for room in self.rooms:
            room.keep_first(room.length + tokens_to_remove)


class RoomySlidingLayer(_RoomyStates, DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` with room, which lets the oldest tokens go for new ones, or first at `crop`."""

    def extend(self, tokens: int) -> None:
        super().extend(tokens)
        self.cumulative_length += tokens
        if not self.record_past:
            self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0 or (self.cumulative_length >= self.sliding_window and not self.record_past):
            super().crop(tokens_to_remove)  # which says what is wrong
        for room in self.rooms:
            room.keep_first(room.length + tokens_to_remove)
        self.cumulative_length = max(self.cumulative_length + tokens_to_remove, 0)
        self._forget()

    def _forget(self) -> None:
        """Leaves what the next token sees."""
        for room in self.rooms:
            room.keep_last(self.sliding_window - 1)


def roomy(layer: Any) -> Any:
    """A dynamic layer as one with room: itself, or what to put in its place; `None` of a layer of another kind."""
    kind = type(layer)
    if isinstance(layer, Rooms):
        return layer
    if kind is DynamicLayer:
        larger = RoomyLayer()
    elif kind is DynamicSlidingWindowLayer:
        larger = RoomySlidingLayer(layer.sliding_window)
    else:
        return None
    vars(larger).update({name: value for name, value in vars(layer).items() if name not in ("keys", "values")})
    larger.keys, larger.values = layer.keys, layer.values
    return larger


def start(layer: Any, batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Makes a layer that has cached nothing yet one of no tokens `[B, N, 0, D]`, on the CPU."""
    states = torch.empty(batch, heads, 0, head_dim, dtype=dtype)
    layer.lazy_initialization(states, states)
    if isinstance(layer, DynamicLayer) and not getattr(layer, "bits", 0):
        layer.keys, layer.values = states, states.clone()


def static_place(layer: StaticLayer, tokens: int, shape: tuple[int, int, int]) -> tuple[int, ...] | None:
    """`Rooms.place` of a static layer; `None` where it is full, or not fp32 or bf16 on the CPU."""
    keys, values = layer.keys, layer.values
    if keys is None or values is None or keys.shape != values.shape or keys.device.type != "cpu":
        return None
    if (*keys.shape[:2], keys.shape[3]) != shape:
        return None
    if keys.dtype not in (torch.float32, torch.bfloat16) or keys.dtype != values.dtype:
        return None
    length = int(layer.cumulative_length)
    if length + tokens > keys.shape[2] or keys.stride() != values.stride() or keys.stride(-1) != 1:
        return None
    batch, head, token, _ = keys.stride()
    return keys.data_ptr(), values.data_ptr(), batch, head, token, length, 0, TYPES[keys.dtype], 0, 0
