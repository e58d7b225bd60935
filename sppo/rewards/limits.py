"""Two ways to run a reward function for a limited time: in a process that can be killed, or here.

The package's documentation says how firm each is.
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
from typing import Any

from sppo.rewards.worker import Expired, RewardError, Verdict

LOAD_TIMEOUT = 300.0
"""Seconds that a worker may take to start and to import a reward's module."""


class Worker:
    """The process that runs named rewards: started once, replaced only after it was killed or died."""

    _current: Worker | None = None

    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # it imports what we can import
        lasts = threading.current_thread() is threading.main_thread()  # as long as the process; another may end before
        serve = f"from sppo.rewards.worker import serve; serve(die_with_parent={lasts})"
        command = [sys.executable, "-c", serve]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.owner = os.getpid()
        self.loaded: dict[str, str] = {}
        self.lock = threading.Lock()
        self.replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    @classmethod
    def current(cls) -> Worker:
        worker = cls._current
        # A forked child (a data loader's worker) must not write into its parent's pipe.
        if worker is None or worker.owner != os.getpid() or worker.process.poll() is not None:
            worker = cls._current = Worker()
        return worker

    def load(self, spec: str) -> None:
        here = os.getcwd()  # from which a file is named; it may have changed since this worker began
        if self.loaded.get(spec) != here:
            self.request({"load": spec, "cwd": here}, LOAD_TIMEOUT)
            self.loaded[spec] = here

    def request(self, message: dict[str, Any], timeout: float) -> list[Verdict]:
        try:
            line = json.dumps(message).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise RewardError(f"cannot be sent to its process ({error}); pass the function itself") from error
        with self.lock:
            try:
                self._send(line)
                reply = self.replies.get(timeout=timeout)
            except queue.Empty:
                self._kill()
                raise _late(timeout) from None
            except BaseException:  # Ctrl-C: the reply on its way must not answer the next request
                self._kill()
                raise
        if not reply:
            raise RewardError(f"ended its process (exit code {self.process.wait()})")
        answer = json.loads(reply)
        if "error" in answer:
            raise RewardError(answer["error"])
        return answer["values"]

    def _send(self, line: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: the empty reply says so

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.replies.put(line)
        self.replies.put(b"")

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()


def within(seconds: float, work: Callable[[], list[Verdict]]) -> list[Verdict]:
    """Do ``work`` in this process, at most so long.

    Raises:
        RewardError: ``work`` raised it, or the time is over.
    """
    if not _can_use_alarm():
        return _within_thread(seconds, work)

    def expire(signum: int, frame: Any) -> None:
        raise Expired

    before = signal.signal(signal.SIGALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # again and again, for functions that catch everything
        try:
            return work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Expired:
        raise _late(seconds) from None
    finally:
        signal.signal(signal.SIGALRM, before)


def _can_use_alarm() -> bool:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return False
    try:
        asyncio.get_running_loop()  # a notebook's: asyncio.run needs a thread of its own then
    except RuntimeError:
        return True
    return False


def _within_thread(seconds: float, work: Callable[[], list[Verdict]]) -> list[Verdict]:
    outcome: queue.SimpleQueue[list[Verdict] | RewardError] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(work())
        except RewardError as error:
            outcome.put(error)
        except Expired:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        result = outcome.get(timeout=seconds)
    except queue.Empty:
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Expired))
        raise _late(seconds) from None
    if isinstance(result, RewardError):
        raise result
    return result


def _late(seconds: float) -> RewardError:
    return RewardError(f"took longer than {seconds:.3g} s")
