"""Time limits for reward functions, in a worker process that can be killed or in the trainer's process.

The docstring of :mod:`sppo.rewards` describes how strict each limit is.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from sppo.rewards.worker import Expired, Parameters, RewardError, SampleResult, TimeLimitError

LOAD_TIMEOUT = 300.0
"""Time limit for starting a worker and importing a reward's module, in seconds."""

EXIT_TIMEOUT = 10.0
"""Time limit for the end of a worker after that of its output, in seconds."""


class Worker:
    """A process that runs named rewards. It is started once, and replaced only after it was killed or has died."""

    _current: ClassVar[dict[int, Worker]] = {}

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the worker can import what this process can
        # The kernel tracks the thread that started the worker, and only the main thread lasts as long as the process.
        is_main = threading.current_thread() is threading.main_thread()
        serve = f"from sppo.rewards.worker import serve; serve(die_with_parent={is_main})"
        command = [sys.executable, "-c", serve]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.owner = os.getpid()
        self.loaded: dict[str, tuple[str, Parameters]] = {}
        self.lock = threading.Lock()
        self.replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    @classmethod
    def current(cls, number: int = 0) -> Worker:
        """Return one of this process's workers, which are numbered from 0; start it if it does not run."""
        worker = cls._current.get(number)
        # A forked child (a data loader's worker) must not write into its parent's pipe.
        if worker is None or worker.owner != os.getpid() or worker.process.poll() is not None:
            worker = cls._current[number] = Worker()
        return worker

    @classmethod
    def kill_all(cls) -> None:
        """Kill this process's workers, which ends the calls that they run."""
        for worker in cls._current.values():
            if worker.owner == os.getpid():
                worker.process.kill()

    def load(self, spec: str) -> Parameters:
        """Import the function ``spec`` in the worker, unless this was done from the same working directory.

        Returns:
            The function's parameters.

        Raises:
            RewardError: it cannot be imported, or the import takes too long.
        """
        cwd = os.getcwd()  # paths of files are relative to it, and it may have changed
        if spec not in self.loaded or self.loaded[spec][0] != cwd:
            reply = self.request({"load": spec, "cwd": cwd}, LOAD_TIMEOUT)
            self.loaded[spec] = cwd, Parameters(**reply)
        return self.loaded[spec][1]

    def request(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a request and wait for the reply; kill the worker after ``timeout`` seconds.

        Raises:
            RewardError: the message is not JSON, the limit was exceeded, the worker died, or the reply is an error.
        """
        try:
            line = json.dumps(message).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise RewardError(f"has arguments that are not JSON ({error}); pass the function itself") from error
        with self.lock:
            try:
                self._send(line)
                reply = self.replies.get(timeout=timeout)
            except queue.Empty:
                self._kill()
                raise _timeout_error(timeout) from None
            except BaseException:  # Ctrl-C: a late reply must not be taken for that of the next request
                self._kill()
                raise
        if not reply:
            raise RewardError(f"ended its process (exit code {self._exit_code()})")
        result = json.loads(reply)
        if "error" in result:
            raise RewardError(result["error"])
        return result

    def _send(self, line: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the worker died; the empty reply reports it

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.replies.put(line)
        self.replies.put(b"")

    def _exit_code(self) -> int:
        """Return the exit code after the output has ended; kill a worker that goes on without it."""
        try:
            return self.process.wait(timeout=EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._kill()
            return self.process.returncode

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()


def run_within(seconds: float, work: Callable[[], list[SampleResult]]) -> list[SampleResult]:
    """Call ``work`` in this process with a time limit.

    Raises:
        RewardError: raised by ``work``, or the limit was exceeded.
    """
    if not _can_use_alarm():
        return _run_in_thread(seconds, work)

    def expire(signum: int, frame: Any) -> None:
        raise Expired

    before = signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # repeated, for functions that catch everything
        try:
            return work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Expired:
        raise _timeout_error(seconds) from None
    finally:
        signal.signal(signal.SIGALRM, before)


def _can_use_alarm() -> bool:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return False
    try:
        asyncio.get_running_loop()  # as in a notebook, where asyncio.run needs a separate thread
    except RuntimeError:
        return True
    return False


def _run_in_thread(seconds: float, work: Callable[[], list[SampleResult]]) -> list[SampleResult]:
    results: queue.SimpleQueue[list[SampleResult] | RewardError] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(work())
        except RewardError as error:
            results.put(error)
        except Expired:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        result = results.get(timeout=seconds)
    except queue.Empty:
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Expired))
        raise _timeout_error(seconds) from None
    if isinstance(result, RewardError):
        raise result
    return result


def _timeout_error(seconds: float) -> TimeLimitError:
    return TimeLimitError(f"took longer than {seconds:.3g} s")
