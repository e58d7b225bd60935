"""What ends a run before its time: SIGTERM, and a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a run that SIGTERM ended, as a shell reports it."""

logger = logging.get_logger(__name__)


class Termination(TrainerCallback):
    """Ends a run at SIGTERM after the update at hand, with a checkpoint; schedulers send it some time before they kill.

    A second SIGTERM ends it at once. A handler of the caller is left in place.
    """

    def __init__(self) -> None:
        self.requested = False
        self.stopped = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle SIGTERM within a context, if this is the main thread and nobody else handles it."""
        self.requested = self.stopped = False
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logger.warning("SIGTERM: the run ends with a checkpoint after this update; a second SIGTERM ends it at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any process was asked to; all of them must do the same."""
        if _is_any(self.requested, args=args):
            self.stopped = True
            control.should_save = control.should_training_stop = True


def _is_any(value: object, *, args: Any) -> bool:
    """Tell whether ``value`` is true on any process."""
    if args.world_size == 1:
        return bool(value)
    found = torch.tensor(float(bool(value)), device=args.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def is_full_disk(error: BaseException) -> bool:
    """Tell whether an error comes from a full disk or a used-up quota; libraries report it in their own ways."""
    known: BaseException | None = error
    while known is not None:
        if isinstance(known, OSError) and known.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # safetensors has the system's text in an error of its own; torch.save only finds fewer bytes than it wrote.
        if any(text in str(known) for text in ("No space left", "Disk quota", "inline_container.cc")):
            return True
        known = known.__cause__ or known.__context__
    return False


def full_disk(name: str, output_dir: Path, error: BaseException) -> OSError:
    """Return the error of a checkpoint that does not fit on the disk of ``output_dir``, with the remedy."""
    free = shutil.disk_usage(output_dir).free
    return OSError(
        errno.ENOSPC,
        f"{name} was not written and its files were removed, because the disk of {os.path.abspath(output_dir)} is full "
        f"({free / 1e9:.1f} GB free; {type(error).__name__}: {str(error).splitlines()[0][:100]}). Free space or lower "
        "save_total_limit, and resume from the last checkpoint; full_disk='continue' trains on without this checkpoint",
    )
