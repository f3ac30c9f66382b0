"""Several models, one thread that computes: loaded when they are asked for, let go under a memory budget, run in turns.

Reading order: a model that is served -> orders from other threads -> the thread: steps, loading, room.
"""

import gc
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..evaluate import inspect
from ..evaluate.source import model_folder
from ..evaluate.table import size
from ..kernels import library
from ..model.linear_llm_kernel import PackedWeight
from .batch import Batch, Request
from .command import check_weights, load

POLL = 0.05  # seconds between looks at whether a model in the way is still in use


class Served:
    """A model that is served: what it takes of the memory (of its files, until it was loaded once), who uses it.

    Raises:
        ValueError: no checkpoint, or a damaged one.
    """

    base: "Served | None" = None  # of an adapter, which is loaded only while its base is
    network: Any = None
    tokenizer: Any = None
    batch: Batch | None = None
    users = 0  # of requests that were let in; changed under the engine's lock
    last_used = 0.0

    def __init__(self, name: str, model: str):
        self.name = name
        self.source = model
        self.folder: Path = model_folder(model)
        check_weights(self.folder)
        self.bytes = inspect(self.folder).bytes_on_disk or 0

    def is_of(self, model: str | None) -> bool:
        """Whether this is the model of a folder or Hub id."""
        return bool(model) and (self.source == model or self.folder.resolve() == Path(model).expanduser().resolve())

    def needed(self) -> "list[Served]":
        """What has to be loaded for it to run, in this order."""
        return [self] if self.base is None else [self.base, self]

    def load(self, dtype: str, most: int) -> None:
        """Loads the model, has it make two tokens, so that all is laid out, and notes the memory that this takes."""
        self.network, self.tokenizer = self._read(dtype)
        if not hasattr(self.tokenizer, "_tokenizer"):
            raise ValueError(f"{self.name}: its tokenizer is no fast one; save it as tokenizer.json.")
        self.batch = Batch(self.network, most)
        never = self.network.config.vocab_size
        config = GenerationConfig(do_sample=False, max_new_tokens=2, eos_token_id=never)
        self.batch.waiting.append(Request(self.network, [0], config, Nowhere()))
        while self.batch.is_busy():
            self.batch.step()
        shared = {} if self.base is None else tensor_bytes(self.base.network)
        self.bytes = sum(taken for place, taken in tensor_bytes(self.network).items() if place not in shared)

    def _read(self, dtype: str) -> tuple[Any, Any]:
        """Network and tokenizer."""
        import_classes(self.folder)
        return load(str(self.folder), dtype)

    def is_busy(self) -> bool:
        return self.batch is not None and self.batch.is_busy()

    def unload(self) -> None:
        self.network = self.tokenizer = self.batch = None
        gc.collect()


def tensor_bytes(network: Any) -> dict[int, int]:
    """Bytes of a model's tensors by where they are: those that it stores, and what packed weights keep beside them.

    How the process grew would say something else every time: files are mapped, and what others have freed is taken.
    """
    kept = (module.kept_tensor() for module in network.modules() if isinstance(module, PackedWeight))
    tensors = [*network.state_dict().values(), *(tensor for tensor in kept if tensor is not None)]
    return {tensor.data_ptr(): tensor.nbytes for tensor in tensors}


def import_classes(folder: Path) -> None:
    """Imports what a model and its tokenizer need, which is not theirs alone."""
    config = AutoConfig.from_pretrained(folder)
    if type(config) in AutoModelForCausalLM._model_mapping:
        AutoModelForCausalLM._model_mapping[type(config)]
    AutoTokenizer.from_pretrained(folder)


class Nowhere:
    """A sink that keeps nothing; a fault is raised."""

    ended = False

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...

    def fail(self, error: Exception) -> None:
        raise error


class Engine:
    """Serves models from a thread of its own.

    Args:
        served: the models, and adapters after them, each of a name of its own.
        dtype: to compute in.
        most: requests that a model runs together.
        budget: bytes that loaded models may take, their laid out weights included and caches not; `None` is no limit.

    Raises:
        ValueError: a model whose files alone are above the budget.
    """

    def __init__(self, served: Sequence[Served], dtype: str = "auto", most: int = 8, budget: int | None = None):
        for model in served:
            if budget is not None and (alone := _bytes(model.needed())) > budget:
                raise ValueError(
                    f"memory={size(budget)}: {model.name} alone takes {size(alone)}; raise it, or compress it."
                )
        self.served = {model.name: model for model in served}
        self.dtype = dtype
        self.most = most
        self.budget = budget
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._asked: deque[tuple[Served, Future[Served]]] = deque()  # first come, first served
        self._lock = threading.Lock()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ---- from any thread ----

    def use(self, name: str) -> "Future[Served]":
        """The model, loaded. It stays so until `release`, and until its requests have ended."""
        future: Future[Served] = Future()
        self._orders.put(lambda: self._asked.append((self.served[name], future)))
        return future

    def release(self, served: Served) -> None:
        with self._lock:
            served.users -= 1

    def submit(self, served: Served, request: Request) -> None:
        """Queues a request of a model that is in use."""
        with self._lock:
            assert served.batch is not None and served.users
            served.users += 1  # until the batch has it

        def queue() -> None:
            served.batch.waiting.append(request)  # type: ignore[union-attr]
            self.release(served)

        self._orders.put(queue)

    def loaded(self) -> list[str]:
        return [model.name for model in self._loaded()]

    def counts(self) -> tuple[int, int]:
        """Requests that run or are read, and that wait."""
        batches = [model.batch for model in self.served.values() if model.batch is not None]
        running = sum(len(batch.running) + (batch.reading is not None) for batch in batches)
        return running, sum(len(batch.waiting) for batch in batches)

    def stop(self) -> None:
        """Ends the thread after the token it is at."""

        def end() -> None:
            self._ending = True

        self._orders.put(end)
        self._thread.join()

    # ---- in the thread ----

    def _run(self) -> None:
        while not self._ending:
            self._take_orders(wait=not any(model.is_busy() for model in self.served.values()))
            self._give_models()
            with library.generating():
                for model in self.served.values():
                    if model.batch is not None and model.is_busy():
                        model.batch.step()

    def _take_orders(self, wait: bool) -> None:
        try:
            if wait:
                self._orders.get(timeout=POLL if self._asked else None)()
            while True:
                self._orders.get_nowait()()
        except queue.Empty:
            return

    def _give_models(self) -> None:
        """Loads what was asked for, in that order; one that has no room yet holds those up that come after it."""
        while self._asked:
            served, future = self._asked[0]
            if not self._has_room(served):
                return
            self._asked.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                for model in served.needed():
                    if model.network is None:
                        self._load(model)
            except Exception as error:
                future.set_exception(error)
                continue
            with self._lock:
                served.users += 1
            for model in served.needed():
                model.last_used = time.monotonic()
            future.set_result(served)

    def _has_room(self, served: Served) -> bool:
        """Whether a model fits, after those that were idle for longest have gone."""
        needed = served.needed()
        missing = [model for model in needed if model.network is None]
        while missing and self.budget is not None and _bytes(self._loaded()) + _bytes(missing) > self.budget:
            if not self._evict_one(needed):
                # More than was known of it when it was let in: it may try alone, and say so.
                return all(model in needed for model in self._loaded())
        return True

    def _load(self, served: Served) -> None:
        started = time.monotonic()
        try:
            served.load(self.dtype, self.most)
        except Exception:
            served.unload()
            raise
        _say(f"{served.name}: loaded in {time.monotonic() - started:.1f} s, takes {size(served.bytes)}")
        needed = served.needed()
        while self.budget is not None and _bytes(self._loaded()) > self.budget:
            if not self._evict_one(needed):
                break
        if self.budget is not None and (alone := _bytes(needed)) > self.budget:
            served.unload()
            raise ValueError(
                f"memory={size(self.budget)}: {served.name} takes {size(alone)} once it is laid out; raise it, or "
                "compress it."
            )

    def _loaded(self) -> list[Served]:
        return [model for model in self.served.values() if model.network is not None]

    def _evict_one(self, kept: list[Served]) -> bool:
        """Lets the loaded model go that is unused and was used least recently; whether there was one."""
        bases = [model.base for model in self._loaded()]
        with self._lock:
            idle = [
                model
                for model in self._loaded()
                if model not in kept and model not in bases and not (model.users or model.is_busy())
            ]
        if not idle:
            return False
        oldest = min(idle, key=lambda model: model.last_used)
        oldest.unload()
        _say(f"{oldest.name}: let go, {size(oldest.bytes)} free")
        return True


def _bytes(models: Sequence[Served]) -> int:
    return sum(model.bytes for model in models)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
