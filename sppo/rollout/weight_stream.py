"""A stream of weights from the trainer to the workers of an inference server, over NCCL or gloo.

Each tensor is announced in a store on the trainer's machine and broadcast as bytes. The group is separate from the
process groups of both sides. This module requires only torch: the trainer needs no vLLM, and the server no trainer.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore, distributed_c10d

TIMEOUT = timedelta(minutes=10)
"""How long one side waits for the other."""

_END = "end"
_POLL = 0.005  # seconds


class WeightStream:
    """One side of the stream.

    Args:
        store: the store of both sides.
        rank: 0 for the trainer, from 1 on for the workers.
        size: number of workers and 1.
        device: where this side has its weights.
        backend: ``"nccl"`` between GPUs, ``"gloo"`` otherwise.
        address: address of this machine that the other side can reach.
    """

    def __init__(
        self, store: TCPStore, *, rank: int, size: int, device: torch.device, backend: str, address: str
    ) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.on_device = device if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            options: Any = distributed_c10d.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            self.group: Any = distributed_c10d.ProcessGroupNCCL(store, rank, size, options)
        else:
            options = distributed_c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = TIMEOUT
            options._devices = [distributed_c10d.ProcessGroupGloo.create_device(hostname=address)]
            self.group = distributed_c10d.ProcessGroupGloo(store, rank, size, options)

    def send(
        self,
        number: int,
        weights: Iterable[tuple[str, Tensor]],
        *,
        dtype: torch.dtype,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Send weights to all workers.

        Args:
            number: names this transfer; each has another.
            weights: weights by name.
            dtype: of the floating-point weights at the workers.
            check: called while workers are not ready; raises if they never will be.
        """
        for rank in range(1, self.size):
            while not self.store.check([f"{number}/listens/{rank}"]):
                check()
                time.sleep(_POLL)
        i = 0
        try:
            for i, (name, tensor) in enumerate(weights, 1):
                cast = tensor.to(self.on_device, dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
                header = {"name": name, "dtype": str(cast.dtype).removeprefix("torch."), "shape": list(cast.shape)}
                self.store.set(f"{number}/{i}", json.dumps(header))
                self._broadcast(cast)
        finally:  # also if a weight could not be made: the workers wait for the end
            self.store.set(f"{number}/{i + 1}", _END)

    def receive(self, number: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of a transfer as they arrive; the sender waits until all are read."""
        self.store.set(f"{number}/listens/{self.rank}", "")
        i = 1
        while (header := self.store.get(f"{number}/{i}")) != _END.encode():
            described = json.loads(header)
            dtype = getattr(torch, described["dtype"])
            tensor = torch.empty(described["shape"], dtype=dtype, device=self.on_device)
            self._broadcast(tensor)
            yield described["name"], tensor
            i += 1

    def _broadcast(self, tensor: Tensor) -> None:
        options = distributed_c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self.group.broadcast([tensor.flatten().view(torch.uint8)], options).wait()


def open_store(address: str) -> TCPStore:
    """Open the store on this machine, at a free port."""
    return TCPStore(address, 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)


def join_store(host: str, port: int) -> TCPStore:
    """Join the store of the trainer's machine."""
    return TCPStore(host, port, is_master=False, timeout=TIMEOUT)


def address_towards(host: str, port: int) -> str:
    """Return the address of this machine on the network that leads to another.

    Raises:
        OSError: the other does not listen.
    """
    with socket.create_connection((host, port), timeout=TIMEOUT.total_seconds()) as connection:
        return connection.getsockname()[0]
