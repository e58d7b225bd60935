"""A vLLM server of one's own: prompts and completions over HTTP, weights over NCCL or gloo.

``python -m sppo.rollout.vllm_serve MODEL`` starts one. Token ids go in, and token ids with their log-probabilities come
out, so that nothing is tokenized twice. The main process sends the weights, and each process its own requests.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sppo.models.lora import merged_weights
from sppo.rollout.engine import Prompt, Sample, encode
from sppo.rollout.generation import check_known
from sppo.rollout.vllm import VLLMEngine
from sppo.rollout.vllm_serve import WORKER
from sppo.rollout.weight_stream import WeightStream, address_towards, open_store

_START = "python -m sppo.rollout.vllm_serve MODEL"
_PAUSE = 1.0  # seconds between two attempts to reach a server that is starting
_LONGEST_REQUEST = 3600.0  # seconds
_MOST_CANDIDATES = 4096  # per token, as JSON
_FINAL_ONLY = 2  # vllm.sampling_params.RequestOutputKind


class ServerError(RuntimeError):
    """The server answered with an error.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """HTTP client of a vLLM server.

    Args:
        base_url: such as ``http://localhost:8000``.
    """

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def wait(self, timeout: float) -> None:
        """Wait until the server is up.

        Raises:
            ConnectionError: it is not, after ``timeout`` seconds.
        """
        end = time.monotonic() + timeout
        while True:
            try:
                return self.call("/health", timeout=max(_PAUSE, timeout))
            except (ConnectionError, ServerError) as error:
                if time.monotonic() >= end:
                    raise ConnectionError(
                        f"no vLLM server answers at {self.base_url} after {timeout:g} seconds ({error}); start one "
                        f"({_START}), or set vllm_server_base_url, or vllm_server_host and vllm_server_port; a longer "
                        "vllm_server_timeout waits for one that loads a large model"
                    ) from error
            time.sleep(_PAUSE)

    def call(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = _LONGEST_REQUEST) -> Any:
        """Send a request, POST if it has a body, and return the parsed answer, None if it is empty.

        Raises:
            ServerError: the server answers with an error.
            ConnectionError: it does not answer.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, headers)
        try:
            with self._opener.open(request, timeout=timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            raise ServerError(f"{self.base_url}{path} answered {error.code}: {text}", error.code) from error
        except (OSError, urllib.error.URLError) as error:
            raise ConnectionError(f"{self.base_url}{path}: {error}") from error
        return json.loads(content) if content else None

    def on_workers(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method of all workers.

        Raises:
            ServerError: the server has no such endpoint or method, or the method failed.
        """
        try:
            return self.call("/collective_rpc", {"method": method, "kwargs": arguments})["results"]
        except ServerError as error:
            if error.status == 404:
                raise ServerError(
                    f"the vLLM server at {self.base_url} has no endpoints for weights: start it with {_START}, or with "
                    f"VLLM_SERVER_DEV_MODE=1 in its environment and --worker-extension-cls {WORKER}",
                    error.status,
                ) from error
            raise


class VLLMServerRollout(VLLMEngine):
    """Samples from a vLLM server that has a copy of the policy's weights, adapters merged.

    The weights are sent before each call. In a run of several processes all of them must call :meth:`generate`, or
    :meth:`skip` if they have no prompts.

    Args:
        policy, tokenizer, **sampling: see :class:`sppo.rollout.vllm.VLLMEngine`.
        base_url: the server, such as ``http://localhost:8000``.
        timeout: how many seconds to wait for it to be up.
        max_concurrent_requests: how many requests this process sends at once.

    Raises:
        ConnectionError: no server answers.
        ServerError: the server cannot receive weights.
        ValueError: the server serves another model, or not what the settings need; the message says how to start it.
    """

    _EXCLUDED = -9999.0  # the server's JSON has no infinity

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base_url: str,
        timeout: float,
        max_concurrent_requests: int = 256,
        **sampling: Any,
    ) -> None:
        super().__init__(policy, tokenizer, **sampling)
        self.max_concurrent_requests = max_concurrent_requests
        self.server = Server(base_url)
        self.server.wait(timeout)
        self.workers = self._describe()
        self._check(self.workers[0])
        self._stream: WeightStream | None = None
        self._num_syncs = 0

    def generate(self, prompts: Sequence[Prompt], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """See :class:`sppo.RolloutEngine`. ``batch_size`` is ignored; set ``--max-num-seqs`` of the server instead.

        Raises:
            ServerError, ConnectionError: the server failed.
        """
        encoded = [encode(prompt, self.tokenizer) for prompt in prompts]
        self.sync()
        requests = [(ids, self.sampling_arguments(seed + i, temperature)) for i, ids in enumerate(encoded)]
        return self.samples_of(prompts, encoded, self._complete_all(requests), temperature)

    def skip(self) -> None:
        """Take part in sending the weights, without prompts."""
        self.sync()

    def sync(self) -> None:
        """Send the policy's weights, from the main process, when no process still samples with the old ones.

        Raises:
            RuntimeError: the server did not take them.
        """
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not several:
            self._send()
            return
        dist.barrier()
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                self._send()
            except Exception as error:
                failure = [f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(failure, src=0)  # so that the others neither wait nor sample with the old weights
        if failure[0] is not None:
            raise RuntimeError(f"the main process could not send weights to {self.server.base_url}: {failure[0]}")

    @torch.no_grad()
    def _send(self) -> None:
        if self._stream is None:
            self._stream = self._connect()
        self._num_syncs += 1
        dtype = getattr(torch, self.workers[0]["dtype"])
        with ThreadPoolExecutor(1) as executor:  # the workers answer when they have received all
            received = executor.submit(self.server.on_workers, "sppo_receive", number=self._num_syncs)
            self._stream.send(
                self._num_syncs, merged_weights(self.policy), dtype=dtype, check=lambda: _raise_failure(received)
            )
            received.result()
        if not (self.server.call("/reset_prefix_cache", {}) or {}).get("success", True):
            raise RuntimeError(
                f"{self.server.base_url} did not drop what it cached with the old weights, because it still answers "
                "other requests; use a server that nobody else uses"
            )

    def _connect(self) -> WeightStream:
        """Open a stream of weights to the server's workers."""
        place = urlsplit(self.server.base_url)
        address = address_towards(str(place.hostname), place.port or (443 if place.scheme == "https" else 80))
        store = open_store(address)
        own = self.policy.device
        gpu = str(torch.cuda.get_device_properties(own).uuid) if own.type == "cuda" else None
        gpus = [worker["gpu"] for worker in self.workers]
        backend = "nccl" if gpu is not None and None not in gpus and gpu not in gpus else "gloo"
        size = len(self.workers) + 1
        with ThreadPoolExecutor(1) as executor:  # both sides wait for each other
            joined = executor.submit(
                self.server.on_workers, "sppo_connect", host=address, port=store.port, size=size, backend=backend
            )
            stream = WeightStream(store, rank=0, size=size, device=own, backend=backend, address=address)
            joined.result()
        return stream

    def _describe(self) -> list[dict[str, Any]]:
        try:
            return self.server.on_workers("sppo_describe")
        except ServerError as error:
            if error.status < 500:
                raise
            raise ServerError(
                f"the workers of the vLLM server at {self.server.base_url} cannot receive weights ({error}): start it "
                f"with {_START}, or with --worker-extension-cls {WORKER}",
                error.status,
            ) from error

    def _check(self, worker: Mapping[str, Any]) -> None:
        """Check that the server serves the policy, and returns what the settings need."""
        where = f"the vLLM server at {self.server.base_url}"
        config = self.policy.config.get_text_config()
        own = {
            "architectures": [type(self.policy).__name__],
            **{name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
        }
        for name, value in own.items():
            if worker[name] != value:
                raise ValueError(
                    f"{where} serves another model: {name} is {worker[name]} there, {value} here; start it with the "
                    "model that is trained"
                )
        self.has_mask = self.records_support and worker["return_sampling_mask"]
        check_known(self.generation_kwargs, worker["sampling_arguments"], "vLLM's SamplingParams")
        needs = {
            "--logprobs-mode processed_logprobs": worker["logprobs_mode"] == "processed_logprobs",
            "--data-parallel-size 1": worker["data_parallel_size"] == 1,
            "without --skip-tokenizer-init, for stop_strings": worker["has_tokenizer"] or not self.stop_strings,
        }
        if self.records_support and not self.has_mask:
            if self._num_candidates > _MOST_CANDIDATES:
                raise ValueError(
                    f"top_k={self.top_k}: {where} returns no sampling mask, and would have to return the "
                    f"log-probabilities of {self._num_candidates} tokens for each; start it with "
                    f"--return-sampling-mask, set top_k to at most {_MOST_CANDIDATES - self._TIES}, or set "
                    "replay_sampling_support=False"
                )
            needs["--max-logprobs -1"] = not 0 <= worker["max_logprobs"] < self._num_candidates
        for option, is_met in needs.items():
            if not is_met:
                raise ValueError(f"{where} does not return what is needed; start it with {_START}, or {option}")

    def _complete_all(self, requests: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Any]:
        """Send requests side by side, and return their outputs in the same order."""
        if not requests:
            return []
        executor = ThreadPoolExecutor(min(len(requests), self.max_concurrent_requests))
        try:
            futures = [executor.submit(self._complete, *request) for request in requests]
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                if self.on_progress is not None:
                    self.on_progress(done, len(requests))
        finally:
            executor.shutdown(cancel_futures=True)
        return [future.result() for future in futures]

    def _complete(self, token_ids: list[int], sampling: dict[str, Any]) -> Any:
        """Return one completion, with the attributes of vLLM's ``CompletionOutput`` that samples are made of."""
        body = {"token_ids": token_ids, "sampling_params": {**sampling, "output_kind": _FINAL_ONLY}}
        try:
            (choice,) = self.server.call("/inference/v1/generate", body)["choices"]
        except ServerError as error:
            if error.status != 404:
                raise
            raise ServerError(
                f"the vLLM server at {self.server.base_url} has no /inference/v1/generate: start it with {_START}, or "
                "with --enable-scale-out; vLLM 0.30 or newer is needed",
                error.status,
            ) from error
        mask = choice.get("sampling_mask")
        return SimpleNamespace(
            token_ids=choice["token_ids"],
            finish_reason=choice["finish_reason"],
            logprobs=[_candidates(entry) for entry in choice["logprobs"]["content"]],
            sampling_mask=None if mask is None else SimpleNamespace(token_ids=mask),
        )


def _candidates(entry: Mapping[str, Any]) -> dict[int, Any]:
    """Return a token's candidates as vLLM does in this process: by token id, itself included."""
    candidates = [*entry["top_logprobs"], entry]
    return {each["token_id"]: SimpleNamespace(logprob=each["logprob"]) for each in candidates}


def _raise_failure(future: Future[Any]) -> None:
    """Raise what a call raised if it has already failed."""
    if future.done():
        future.result()
