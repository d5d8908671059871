"""What the host does beside feeding the devices: it keeps time, hears signals and records profiles."""

import contextlib
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils


class Clock:
    """Wall-clock seconds by activity: `with clock("eval"): ...` adds to clock.seconds["eval"]."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._began = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[activity] += time.monotonic() - began

    def total(self) -> float:
        return time.monotonic() - self._began


class StopSignal:
    """SIGTERM or Ctrl-C ask for a stop between two steps; the second of its kind acts at once, as usual.

    With several processes jax's coordination service listens for SIGTERM (to whichever process it comes) and names the
    step at which all of them stop; Ctrl-C is passed on to it.
    """

    def __init__(self) -> None:
        self.received: int = signal.SIGTERM
        self._stop = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread listen
            self._before = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        signal.signal(number, self._before[number])
        self.received, self._stop = number, True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step: the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._stop

    def leave(self) -> None:
        """Ends the process as the signal asks: exit status 143 after SIGTERM, KeyboardInterrupt after Ctrl-C."""
        raise KeyboardInterrupt if self.received == signal.SIGINT else SystemExit(128 + signal.SIGTERM)


class Profile:
    """Traces a window (first step, number of steps) into a folder, for xprof, TensorBoard or Perfetto."""

    def __init__(self, folder: epath.Path, window: tuple[int, int] | None):
        self._folder, self._window, self._tracing = folder, window, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._tracing:
            self.turn()

    def due(self, step: int) -> bool:
        """Whether the trace starts or ends before this step: the devices should be idle then."""
        if self._window is None:
            return False
        first, count = self._window
        return step == (first + count if self._tracing else first)

    def turn(self) -> None:
        """Starts the trace, or ends it. The first process alone traces its devices."""
        if jax.process_index() == 0:
            if self._tracing:
                jax.profiler.stop_trace()
            else:
                jax.profiler.start_trace(str(self._folder))
        self._tracing = not self._tracing
