"""What a vLLM server needs to receive weights: ``vllm serve --worker-extension-cls ...WeightReceiver``."""

from __future__ import annotations

from typing import Any

import torch

from sppo.rollout.weight_stream import WeightStream, address_towards, join_store


class WeightReceiver:
    """Methods that vLLM adds to its workers, for ``/collective_rpc``."""

    _sppo_stream: WeightStream | None = None

    def sppo_describe(self: Any) -> dict[str, Any]:
        """Return what the trainer checks before it relies on this server."""
        from vllm import SamplingParams

        config = self.vllm_config
        model, text = config.model_config, config.model_config.hf_text_config
        on_gpu = self.device.type == "cuda"
        return {
            "architectures": list(model.architectures),
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
            "max_logprobs": model.max_logprobs,
            "return_sampling_mask": bool(getattr(model, "return_sampling_mask", False)),
            "has_tokenizer": not model.skip_tokenizer_init,
            "data_parallel_size": config.parallel_config.data_parallel_size,
            "gpu": str(torch.cuda.get_device_properties(self.device).uuid) if on_gpu else None,
            "sampling_arguments": list(SamplingParams.__struct_fields__),
        }

    def sppo_connect(self: Any, host: str, port: int, size: int, backend: str) -> None:
        """Join the trainer's stream of weights; an earlier one is dropped."""
        self._sppo_stream = None
        self._sppo_stream = WeightStream(
            join_store(host, port),
            rank=self.rank + 1,
            size=size,
            device=self.device,
            backend=backend,
            address=address_towards(host, port),
        )

    def sppo_receive(self: Any, number: int) -> None:
        """Replace the weights by those of a transfer."""
        if self._sppo_stream is None:
            raise RuntimeError("the trainer is not connected; was the server restarted?")
        weights = self._sppo_stream.receive(number)
        try:
            self.reload_weights(weights_iterator=weights)
        finally:
            for _ in weights:  # what a failure left, for which the trainer would wait
                pass
