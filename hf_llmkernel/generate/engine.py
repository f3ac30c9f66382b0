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
from ..evaluate.clean_process import resident_bytes
from ..evaluate.source import model_folder
from ..evaluate.table import size
from ..kernels import library
from .batch import Batch, Request
from .command import check_weights, load

POLL = 0.05  # seconds between looks at whether a model in the way is still in use


class Served:
    """A model that is served: what it takes of the memory (of its files, until it was loaded once), who uses it.

    Raises:
        ValueError: no checkpoint, or a damaged one.
    """

    def __init__(self, name: str, model: str):
        self.name = name
        self.folder: Path = model_folder(model)
        check_weights(self.folder)
        self.bytes = inspect(self.folder).bytes_on_disk or 0
        self.network: Any = None
        self.tokenizer: Any = None
        self.batch: Batch | None = None
        self.users = 0  # of requests that were let in; changed under the engine's lock
        self.last_used = 0.0

    def load(self, dtype: str, most: int) -> None:
        """Loads the model, has it make two tokens, so that all is laid out, and notes the memory that this took."""
        import_classes(self.folder)
        before = resident_bytes()
        self.network, self.tokenizer = load(str(self.folder), dtype)
        if not hasattr(self.tokenizer, "_tokenizer"):
            raise ValueError(f"{self.name}: its tokenizer is no fast one; save it as tokenizer.json.")
        self.batch = Batch(self.network, most)
        never = self.network.config.vocab_size
        config = GenerationConfig(do_sample=False, max_new_tokens=2, eos_token_id=never)
        self.batch.waiting.append(Request(self.network, [0], config, Nowhere()))
        while self.batch.is_busy():
            self.batch.step()
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in self.network.state_dict().values()}
        self.bytes = max(resident_bytes() - before, sum(tensors.values()))

    def is_busy(self) -> bool:
        return self.batch is not None and self.batch.is_busy()

    def unload(self) -> None:
        self.network = self.tokenizer = self.batch = None
        gc.collect()


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
        served: the models, by name.
        dtype: to compute in.
        most: requests that a model runs together.
        budget: bytes that loaded models may take, their laid out weights included and caches not; `None` is no limit.

    Raises:
        ValueError: a model whose files alone are above the budget.
    """

    def __init__(self, served: Sequence[Served], dtype: str = "auto", most: int = 8, budget: int | None = None):
        for model in served:
            if budget is not None and model.bytes > budget:
                raise ValueError(
                    f"memory={size(budget)}: {model.name} alone takes {size(model.bytes)}; raise it, or compress it."
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
        return [model.name for model in self.served.values() if model.network is not None]

    def counts(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        batches = [model.batch for model in self.served.values() if model.batch is not None]
        return sum(len(batch.running) for batch in batches), sum(len(batch.waiting) for batch in batches)

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
            if served.network is None and not self._has_room(served):
                return
            self._asked.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if served.network is None:
                    self._load(served)
            except Exception as error:
                served.unload()
                future.set_exception(error)
                continue
            with self._lock:
                served.users += 1
            served.last_used = time.monotonic()
            future.set_result(served)

    def _has_room(self, served: Served) -> bool:
        """Whether a model fits, after those that were idle for longest have gone."""
        while self.budget is not None and self._taken() + served.bytes > self.budget:
            if not self._evict_one(served):
                # More than was known of it when it was let in: it may try alone, and say so.
                return not self.loaded()
        return True

    def _load(self, served: Served) -> None:
        started = time.monotonic()
        served.load(self.dtype, self.most)
        _say(f"{served.name}: loaded in {time.monotonic() - started:.1f} s, takes {size(served.bytes)}")
        while self.budget is not None and self._taken() > self.budget:
            if not self._evict_one(served):
                break
        if self.budget is not None and served.bytes > self.budget:
            raise MemoryError(f"{served.name} takes {size(served.bytes)}, the budget is {size(self.budget)}")

    def _taken(self) -> int:
        return sum(model.bytes for model in self.served.values() if model.network is not None)

    def _evict_one(self, kept: Served) -> bool:
        """Lets the loaded model go that is unused and was used least recently; whether there was one."""
        with self._lock:
            idle = [
                model
                for model in self.served.values()
                if model is not kept and model.network is not None and not (model.users or model.is_busy())
            ]
        if not idle:
            return False
        oldest = min(idle, key=lambda model: model.last_used)
        oldest.unload()
        _say(f"{oldest.name}: let go, {size(oldest.bytes)} free")
        return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
