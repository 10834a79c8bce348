"""The thread that runs one engine of a server, through compilation, failures and the end. Used by service.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from nanochat.common import logger
from nanochat.engine import Engine


class EngineThread:
    """A thread that runs an engine's scheduler until it is closed; other threads submit texts and cancel them."""

    def __init__(self, engine: Engine, after_step: Callable[[], None] = lambda: None, compile: bool = False) -> None:
        """after_step: called in the thread after each step, when all `on_update` calls of that step are done.

        compile: whether to compile first; what is submitted meanwhile waits.
        """
        self.engine, self.scheduler, self.after_step = engine, engine.scheduler, after_step
        self.compile = compile
        self.failures, self.failed_at = 0, 0.0  # steps that failed in a row; time.monotonic() of the last failure
        self.ready = threading.Event()
        self._closing = threading.Event()
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self.thread.start()

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive()

    @property
    def takes_work(self) -> bool:
        """False before the start and after the end, when submitted texts might wait forever."""
        return self.is_alive and not self._closing.is_set()

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop after the current step; unfinished texts end with the reason "cancelled"."""
        self._closing.set()
        self.scheduler.post(lambda: None)
        self.thread.join(timeout_s)

    def _use_device(self) -> None:
        """Select this engine's GPU: a new thread starts on the first one."""
        if (device := self.engine.model.get_device()).type == "cuda":
            torch.cuda.set_device(device)

    def _run(self) -> None:
        self._use_device()
        if self.compile:
            self._compile()
        if not self._closing.is_set():
            self.ready.set()
        while not self._closing.is_set():
            try:
                if self.scheduler.is_idle:
                    self.scheduler.wait()
                else:
                    had_work = self.scheduler.num_waiting + self.scheduler.num_running > 0
                    before = self.scheduler.generated_tokens
                    self.scheduler.step()
                    # A step that only computed a chunk of a prompt proves nothing: that text may still fail.
                    if self.scheduler.generated_tokens > before or (had_work and self.scheduler.prefilling is None):
                        self.failures = 0
            except Exception:  # a failed step ends the requests in it, not the service
                logger.exception("a step of the model failed")
                self.failures, self.failed_at = self.failures + 1, time.monotonic()
                self._end_all("error", "the model failed on this request: see the server's log")
            self.after_step()
        self._end_all("cancelled")
        self.after_step()
        self.scheduler.close()

    def _end_all(self, reason: str, error: str | None = None) -> None:
        """End every text; if even that fails on the device, as after some CUDA errors, the thread ends too."""
        try:
            self.scheduler.end_all(reason, error)
        except Exception:
            logger.exception("the device fails at everything: this copy of the model is given up")
            self._closing.set()
            self.scheduler.end_all_on_host(reason, error)

    def _compile(self) -> None:
        """Compile in another thread, so that texts can be cancelled meanwhile and closing does not wait for the compiler."""
        reasons: list[str | None] = []

        def compile_there() -> None:
            self._use_device()
            reasons.append(self.engine.compile())

        compiler = threading.Thread(target=compile_there, name="compiler", daemon=True)
        compiler.start()
        while compiler.is_alive() and not self._closing.is_set():
            self.scheduler.wait(timeout_s=0.1)
            self.after_step()
        if reasons and reasons[0] is not None:
            logger.warning("decoding without torch.compile: %s", reasons[0])
