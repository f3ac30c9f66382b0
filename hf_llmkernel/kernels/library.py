"""The native library by ctypes: its structures (see native/llmkernel.h), whether it is there, and whether it is in use.

Environment: LLMKERNEL_KERNELS=off runs everything on torch, LLMKERNEL_ISA (avx512, avx2, portable) lowers the
instruction set, LLMKERNEL_THREADS is the number of threads where torch's own is not wanted,
LLMKERNEL_ACTIVATIONS=float32 keeps the inputs of integer matrices as they are, which are rounded to int8 without it,
and LLMKERNEL_PATHS=native leaves all to the kernels, where a measurement would say what they are faster at.
"""

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

ABI = 5
LIBRARY = Path(__file__).with_name("libllmkernel.so")
NONE, F32, BF16, INT8, INT4, SPARSE_INT8, SPARSE_INT4, SPARSE_BF16 = range(8)  # llmk_kind
TYPES = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}  # llmk_type
ISAS = ("avx512", "avx2", "portable")  # the best that the processor has, unless one is wanted
MOST_THREADS = 1024
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3}  # llmk_activation


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "rows", "columns", "group", "scale_type", "zero_type")),
        ("data", ctypes.c_void_p),
    ]


class Stored(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rows", "columns", "bits", "value_type", "group", "scale_type")),
        *((name, ctypes.c_int32) for name in ("zero_type", "row_values")),
        ("values", ctypes.c_void_p),
        ("value_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("mask", "scales", "zeros")),
    ]


class Linear(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("first", "second", "adapter_a", "adapter_b")),
        ("bias", ctypes.c_void_p),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("attends", "feeds", "heads", "key_value_heads", "window", "gated")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "query_norm", "key_norm")),
        *((name, Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("layers", "hidden", "head_dim", "activation", "rounds_inputs")),
        *((name, ctypes.c_float) for name in ("epsilon", "rotary_scale")),
        *((name, ctypes.c_void_p) for name in ("rotary_frequencies", "final_norm", "layer")),
        ("head", Linear),
        ("embedding", Stored),
    ]


class Unusable(Exception):
    """The library was not built, or is none for this package; says which, and the remedy."""


def load() -> ctypes.CDLL:
    """Raises `Unusable` where the library was not built, is damaged or of another ABI."""
    remedy = "run `python -m hf_llmkernel.kernels.build`"
    if not LIBRARY.is_file():
        raise Unusable(f"{LIBRARY.name} was not built with the package; install a C++ compiler and {remedy}")
    remedy = f"remove it and {remedy}"
    try:
        if _is_cut(LIBRARY):
            raise Unusable(f"{LIBRARY} ends early; {remedy}")
        library = ctypes.CDLL(str(LIBRARY))
        abi = library.llmk_abi()
    except (OSError, AttributeError) as error:
        reason = str(error).removeprefix(f"{LIBRARY}: ")
        raise Unusable(f"{LIBRARY} does not load ({reason}); {remedy}") from None
    if abi != ABI:
        raise Unusable(f"{LIBRARY} is of another version of the package (ABI {abi}, not {ABI}); {remedy}")
    library.llmk_isa.restype = library.llmk_set_isa.restype = ctypes.c_char_p
    library.llmk_set_isa.argtypes = [ctypes.c_char_p]
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for name, arguments in {
        "llmk_plan": [pointer, pointer, pointer],
        "llmk_pack": [pointer, pointer, pointer, int32],
        "llmk_apply": [pointer, pointer, int32, int64, pointer, int32, int32, int32],
        "llmk_decode": [pointer, pointer, pointer, int64, pointer, pointer, int64, pointer, int32, int32],
        "llmk_read": [pointer, pointer, pointer, *[int64] * 2, pointer, pointer, *[int64] * 2, pointer, int32, int32],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_char_p
    return library


def _is_cut(path: Path) -> bool:
    """Whether an ELF file of 64 bits is shorter than it says. Loading it would end the process by SIGBUS."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02"):
        return False
    (sections,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < sections + size * count  # the table of sections comes last


NATIVE: ctypes.CDLL | None = None
try:
    NATIVE, _fault = load(), ""
except Unusable as error:
    _fault = str(error)
_disabled: ContextVar[bool] = ContextVar("llmkernel_kernels_disabled", default=False)


def is_enabled() -> bool:
    """Whether native kernels serve: the library is there, and neither the environment nor `disabled()` says no.

    Raises:
        ValueError: $LLMKERNEL_KERNELS, $LLMKERNEL_ISA or $LLMKERNEL_PATHS that is none of its values.
    """
    return is_wanted() and NATIVE is not None


def is_wanted() -> bool:
    """The same, whether or not the library is there."""
    wanted = _setting("LLMKERNEL_KERNELS", ("on", "off"))
    _setting("LLMKERNEL_ISA", ISAS)
    measures_paths()
    return wanted == "on" and not _disabled.get()


def is_usable() -> bool:
    """Whether the library is there. Asked where it is wanted: a warning says what is wrong, once in a process."""
    if NATIVE is None:
        logger.warning_once(
            f"hf_llmkernel: no native kernels, so torch computes, several times more slowly: {_fault}, or set "
            "LLMKERNEL_KERNELS=off to do without."
        )
    return NATIVE is not None


def measures_paths() -> bool:
    """Whether measurements say which path a product takes, rather than all being native: by $LLMKERNEL_PATHS.

    Raises:
        ValueError: it is neither `measured` nor `native`.
    """
    return _setting("LLMKERNEL_PATHS", ("measured", "native")) == "measured"


def _setting(name: str, values: tuple[str, ...]) -> str:
    """A variable of the environment; the first of its values where it is not set, or empty."""
    value = os.environ.get(name) or values[0]
    if value not in values:
        raise ValueError(f"{name}={value!r}: must be {' or '.join(values)}.")
    return value


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Within it everything runs on torch."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


_floating: ContextVar[bool] = ContextVar("llmkernel_floating_activations", default=False)


@contextlib.contextmanager
def floating_activations() -> Iterator[None]:
    """Within it the inputs of integer matrices stay floats: results are those of the dense weights, more slowly."""
    token = _floating.set(True)
    try:
        yield
    finally:
        _floating.reset(token)


def rounds_inputs() -> bool:
    """Whether inputs of integer matrices are rounded to int8: not in `floating_activations`, nor by the environment.

    Raises:
        ValueError: $LLMKERNEL_ACTIVATIONS that is neither `int8` nor `float32`.
    """
    return _setting("LLMKERNEL_ACTIVATIONS", ("int8", "float32")) == "int8" and not _floating.get()


def isa() -> str | None:
    """The instruction set in use ("avx512", "avx2", "portable"), or `None` without the library."""
    return None if NATIVE is None else NATIVE.llmk_isa().decode()


_generating: ContextVar[int] = ContextVar("llmkernel_generating", default=0)  # torch's threads before `generating`


def threads() -> int:
    """Threads of a native call: $LLMKERNEL_THREADS, else torch's.

    Raises:
        ValueError: $LLMKERNEL_THREADS that is no number from 1 to 1024.
    """
    wanted = os.environ.get("LLMKERNEL_THREADS")
    if not wanted:
        return _generating.get() or torch.get_num_threads()
    if not wanted.isdecimal() or not 1 <= int(wanted) <= MOST_THREADS:
        raise ValueError(f"LLMKERNEL_THREADS={wanted!r}: must be a whole number from 1 to {MOST_THREADS}.")
    return int(wanted)


@contextlib.contextmanager
def generating() -> Iterator[None]:
    """Within it torch has one thread after a native step, and its own number after any other forward.

    What `generate` does between two steps is little, but torch shares it out, and then its other threads spin for
    milliseconds in case there is more: on cores that the next step needs (with two, steps took 1.5 times as long).
    """
    before = torch.get_num_threads()
    token = _generating.set(_generating.get() or before)
    try:
        yield
    finally:
        _generating.reset(token)
        torch.set_num_threads(before)


def leave_to_torch(native: bool) -> None:
    """Torch's threads until the next forward, within `generating`."""
    if (before := _generating.get()) and (wanted := 1 if native else before) != torch.get_num_threads():
        torch.set_num_threads(wanted)


def check(fault: bytes | None) -> None:
    """Raises `RuntimeError` where a native function says what is wrong."""
    if fault is not None:
        raise RuntimeError(f"native kernels: {fault.decode()}")
