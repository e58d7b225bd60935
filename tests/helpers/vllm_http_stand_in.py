"""A stand-in for a vLLM server: its HTTP endpoints, with this package's own receiver of weights behind them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from sppo.rollout.vllm_worker import WeightReceiver

DESCRIPTION = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 27,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "dtype": "float32",
    "logprobs_mode": "processed_logprobs",
    "max_logprobs": -1,
    "return_sampling_mask": False,
    "has_tokenizer": True,
    "data_parallel_size": 1,
    "gpu": None,
    "sampling_arguments": ["presence_penalty"],
}
"""What a server reports that serves ``tiny_model()``."""


class Worker(WeightReceiver):
    """Keeps the weights that it receives.

    Args:
        rank: of the worker.
        description: what it reports of itself.
    """

    device = torch.device("cpu")

    def __init__(self, rank: int, description: dict):
        self.rank = rank
        self.description = description
        self.weights: dict[str, torch.Tensor] = {}

    def sppo_describe(self):
        return self.description

    def reload_weights(self, weights_iterator):
        self.weights = {name: weight.clone() for name, weight in weights_iterator}


class StandIn(ThreadingHTTPServer):
    """The server.

    Attributes:
        calls: endpoints or methods of the workers in the order of their calls.
        requests: bodies of the requests for completions.
        answers: by path, a status and a text to answer instead.
        delays: seconds by seed that a completion takes.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, num_workers: int = 1, **changes):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.workers = [Worker(rank, DESCRIPTION | changes) for rank in range(num_workers)]
        self.calls: list[str] = []
        self.requests: list[dict] = []
        self.answers: dict[str, tuple[int, str]] = {}
        self.delays: dict[int, float] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def on_workers(self, method: str, arguments: dict) -> list:
        """Call a method of all workers side by side."""
        results: list = [None] * len(self.workers)

        def call(i):
            try:
                results[i] = getattr(self.workers[i], method)(**arguments)
            except ValueError as error:
                results[i] = error

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(self.workers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def complete(self, body: dict) -> dict:
        """Answer with two tokens that tell the prompt and the seed, and candidates if they are asked for."""
        self.requests.append(body)
        sampling = body["sampling_params"]
        time.sleep(self.delays.get(sampling["seed"], 0.0))
        tokens = [2 + (len(body["token_ids"]) + sampling["seed"]) % 10, 1]
        excluded = [{"token_id": 20 + i, "logprob": -9999.0} for i in range(sampling["logprobs"] - 2)]
        entries = [
            {
                "token_id": token,
                "logprob": -0.5,
                "top_logprobs": [{"token_id": token, "logprob": -0.5}, {"token_id": 12, "logprob": -1.5}, *excluded]
                if excluded
                else [],
            }
            for token in tokens
        ]
        mask = [[token, 13] for token in tokens] if self.workers[0].description["return_sampling_mask"] else None
        choice = {"token_ids": tokens, "finish_reason": "stop", "sampling_mask": mask, "logprobs": {"content": entries}}
        return {"choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self):
        self._answer({})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path in self.server.answers or self.path == "/reset_prefix_cache":
            self._answer({"success": True})
        elif self.path == "/collective_rpc":
            self.server.calls.append(body["method"])
            results = self.server.on_workers(body["method"], body["kwargs"])
            failed = [result for result in results if isinstance(result, Exception)]
            self._answer(str(failed[0]) if failed else {"results": results}, 500 if failed else 200)
        else:
            self._answer(self.server.complete(body))

    def _answer(self, content, status=200):
        if self.path != "/collective_rpc" or self.path in self.server.answers:
            self.server.calls.append(self.path)
        text = content if isinstance(content, str) else json.dumps(content)
        status, text = self.server.answers.get(self.path, (status, text))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        """Print nothing."""


@contextmanager
def serving(num_workers: int = 1, **changes) -> Iterator[StandIn]:
    """Run a stand-in within a context; ``changes`` are of what it reports."""
    server = StandIn(num_workers, **changes)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
