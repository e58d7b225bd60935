"""transformers' continuous batching: a finished sequence is replaced by the next one, and the cache is paged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, cast

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from sppo.rollout.ending import Ending, samples_of
from sppo.rollout.engine import Prompt, Sample, encode
from sppo.rollout.hf import HFRollout
from sppo.rollout.support import SupportRecorder


class ContinuousRollout(HFRollout):
    """Samples from the trained model itself, and returns the log-probabilities it sampled with.

    transformers has no option that returns the kept tokens. They are recorded by a logits processor that is appended
    to those of its manager, in internals of transformers 5.24.

    Nor has it stop strings. A request that completes one is finished where it would be at an end-of-sequence token.

    Args:
        policy, tokenizer, max_completion_length, top_p, top_k, min_p, return_support, stop_strings: see
            :class:`sppo.HFRollout`.
        generation_kwargs: further arguments of ``transformers.GenerationConfig``, of those that depend only on the
            logits of a token: continuous batching has not the tokens before it.
        settings: arguments of ``transformers.generation.ContinuousBatchingConfig``, such as ``max_batch_tokens``.
            Without a GPU ``num_blocks`` defaults to 64, because transformers derives it from the memory of a GPU.

    Raises:
        ValueError: an argument does not work with continuous batching.
    """

    _GENERATION_KWARGS = (
        "suppress_tokens",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "top_h",
        "renormalize_logits",
        "remove_invalid_values",
    )

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_completion_length: int,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = None,
        return_support: bool = True,
        stop_strings: Sequence[str] | None = None,
        generation_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(
            policy,
            tokenizer,
            max_completion_length=max_completion_length,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            return_support=return_support,
            stop_strings=stop_strings,
            generation_kwargs=generation_kwargs,
        )
        for name in self.generation_kwargs:
            if name not in self._GENERATION_KWARGS:
                raise ValueError(
                    f"generation_kwargs: {name!r} does not work with rollout_engine='continuous', which has only "
                    f"{', '.join(self._GENERATION_KWARGS)}; use rollout_engine='hf' or 'vllm'"
                )
        ContinuousBatchingConfig(**settings)  # raises now if it has no such setting
        if self.records_support and settings.get("use_async_batching"):
            raise ValueError(
                "use_async_batching=True prepares a step before the support of the last one is read; leave it out, or "
                "set replay_sampling_support=False"
            )
        self.settings = settings

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """See :class:`sppo.RolloutEngine`.

        Raises:
            RuntimeError: the engine failed on a prompt.
        """
        encoded = [encode(prompt, self.tokenizer) for prompt in prompts]
        generation = self._settings(temperature)
        recorder = SupportRecorder() if self.records_support and temperature > 0 else None
        ending = self.ending()
        with (
            self.sampling(seed, generation),
            _hooked(self.policy, recorder, self.on_progress, len(encoded)),
            _stopping(ending) if ending.stop_strings else nullcontext(),
        ):
            outputs = self._run(encoded, generation, seed, batch_size)
        responses = [ending.cut(output.generated_tokens) for output in outputs]
        lengths = [len(response.tokens) for response in responses]
        logprobs = [output.logprobs[:length] for output, length in zip(outputs, lengths, strict=True)]
        supports = None
        if recorder is not None:
            supports = recorder.supports({o.request_id: n for o, n in zip(outputs, lengths, strict=True)})
        return samples_of(prompts, encoded, responses, self.tokenizer, logprobs, supports)

    def _run(self, encoded: list[list[int]], generation: GenerationConfig, seed: int, batch_size: int) -> list[Any]:
        on_gpu = self.policy.device.type == "cuda"
        own: dict[str, Any] = {"return_logprobs": True, "seed": seed % 2**31, "max_requests_per_batch": batch_size}
        if self.records_support:
            own["use_async_batching"] = False
        if not on_gpu:
            own |= {"num_blocks": 64, "max_batch_tokens": 1024, "use_cuda_graph": False}
        config = ContinuousBatchingConfig(**{**own, **self.settings})
        outputs = cast(Any, self.policy).generate_batch(
            encoded, generation_config=generation, continuous_batching_config=config, progress_bar=False
        )
        found = list(outputs.values())
        if failed := [output.error for output in found if output.error]:
            raise RuntimeError(f"continuous batching failed on {len(failed)} of {len(encoded)} prompts: {failed[0]}")
        if len(found) < len(encoded):
            raise RuntimeError(f"continuous batching answered {len(found)} of {len(encoded)} prompts; see the log")
        return found


class _StepRecorder:
    """Logits processor of continuous batching that keeps what the processors before it left.

    The kept tokens stay in one buffer, so that a captured graph writes them too, and are read before the next step.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs = ()

    def __init__(self, recorder: SupportRecorder, max_requests: int) -> None:
        self.recorder = recorder
        self.max_requests = max_requests
        self.requests: list[str] = []
        self.kept: Tensor | None = None

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Fill the argument that transformers stores for each processor; this one has none."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Note whose tokens the next step samples."""
        self.flush()
        self.requests = [request.state.request_id for request in requests_with_new_token]
        return torch.zeros(len(self.requests), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Note what is kept; rows after those of the requests are padding."""
        if self.kept is None:
            self.kept = torch.zeros(self.max_requests, scores.shape[1], dtype=torch.bool, device=scores.device)
        self.kept[: len(scores)] = scores > -torch.inf
        return scores

    def flush(self) -> None:
        """Record the last step."""
        if self.requests:
            assert self.kept is not None
            self.recorder.add(self.requests, self.kept[: len(self.requests)])
        self.requests = []


@contextmanager
def _hooked(
    policy: PreTrainedModel,
    recorder: SupportRecorder | None,
    on_progress: Callable[[int, int], None] | None,
    num_requests: int,
) -> Iterator[None]:
    """Record what the policy's continuous batching keeps, and report finished requests, within a context.

    Raises:
        RuntimeError: transformers has other internals than those this requires.
    """
    if recorder is None and on_progress is None:
        yield
        return
    model = cast(Any, policy)
    init, steps = model.init_continuous_batching, []

    def init_with_hooks(*args: Any, **kwargs: Any) -> Any:
        manager = init(*args, **kwargs)
        if recorder is not None:
            steps.append(_append_recorder(manager, recorder))
        if on_progress is not None:
            manager.get_result = _counting(manager.get_result, on_progress, num_requests)
        return manager

    model.init_continuous_batching = init_with_hooks
    try:
        yield
        for step in steps:
            step.flush()
    finally:
        del model.init_continuous_batching


def _counting(
    get_result: Callable[..., Any], on_progress: Callable[[int, int], None], num_requests: int
) -> Callable[..., Any]:
    """Return ``get_result`` of a manager such that it reports how many requests are finished."""
    done = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = get_result(*args, **kwargs)
        if result is not None and result.is_finished():
            done += 1
            on_progress(done, num_requests)
        return result

    return counted


@contextmanager
def _stopping(ending: Ending) -> Iterator[None]:
    """Finish requests of continuous batching at stop strings within a context.

    Raises:
        RuntimeError: transformers has other internals than those this requires.
    """
    try:
        from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

        state_class = cast(Any, RequestState)
        update = state_class.update_and_check_completion
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"rollout_engine='continuous' cannot stop at stop_strings with transformers {transformers.__version__} "
            f"({error}); use rollout_engine='hf'"
        ) from error

    def update_and_check_completion(state: Any, *args: Any, **kwargs: Any) -> bool:
        finished = update(state, *args, **kwargs)
        if not finished and ending.has_stop_string(state.generated_tokens[-ending.window :]):
            state.status = RequestStatus.FINISHED
            finished = True
        return finished

    state_class.update_and_check_completion = update_and_check_completion
    try:
        yield
    finally:
        state_class.update_and_check_completion = update


def _append_recorder(manager: Any, recorder: SupportRecorder) -> _StepRecorder:
    """Append a recorder to the logits processors of a manager that has not started."""
    try:
        from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

        ContinuousBatchingLogitsProcessor.register(_StepRecorder)
        step = _StepRecorder(recorder, manager.continuous_batching_config.max_requests_per_batch)
        manager.logit_processor.logits_processor.append(step)
        manager.logit_processor.tensors_required += 1
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"rollout_engine='continuous' cannot record the sampling support with transformers "
            f"{transformers.__version__} ({error}); use rollout_engine='hf', or set replay_sampling_support=False"
        ) from error
    return step
