"""transformers' ``generate()`` in the process that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sppo.models.packed_attention import use_attention
from sppo.rollout.ending import Ending, ReportProgress, Response, StopAtStrings, samples_of
from sppo.rollout.engine import Prompt, Sample, encode, eos_tokens
from sppo.rollout.generation import check_known
from sppo.rollout.support import SupportRecorder, is_truncated
from sppo_kernels import Support


class HFRollout:
    """Samples in batches padded on the left, each of which ends with its longest response.

    The policy's own generation settings (top_p, repetition penalty and so on) are ignored, except for its
    end-of-sequence tokens: samples must come from the distribution whose log-probabilities are trained.

    Args:
        policy: the model that is trained; it samples with its present attention implementation.
        tokenizer: tokenizer with an eos token and a pad token.
        max_completion_length: maximum number of tokens per completion.
        top_p: probability of the tokens to sample from; 1 for all.
        top_k: number of the tokens to sample from; 0 for all.
        min_p: least probability relative to the most likely token; None for none.
        return_support: whether samples from a truncated distribution have ``support``, the tokens that were kept.
        stop_strings: texts that end a response.
        generation_kwargs: further arguments of ``transformers.GenerationConfig``.
        cache_implementation: None for a cache that grows, ``"static"`` for one of fixed size, with which transformers
            compiles the decoding step on a GPU (docs/guides/rollouts.md).

    Raises:
        ValueError: ``GenerationConfig`` has no such argument.
    """

    on_progress: Callable[[int, int], None] | None = None

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
        cache_implementation: str | None = None,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_completion_length = max_completion_length
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.records_support = return_support and is_truncated(top_p, top_k, min_p)
        self.stop_strings = stop_strings
        self.generation_kwargs = dict(generation_kwargs or {})
        check_known(self.generation_kwargs, vars(GenerationConfig()), "transformers' GenerationConfig")
        self.cache_implementation = cache_implementation
        self.attention = policy.config._attn_implementation
        self.eos_ids = eos_tokens(policy, tokenizer)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], *, seed: int, temperature: float, batch_size: int) -> list[Sample]:
        """See :class:`sppo.RolloutEngine`. The global random state does not change."""
        encoded = [encode(prompt, self.tokenizer) for prompt in prompts]
        responses: list[Response] = []
        supports: list[Support] = []
        settings = self._settings(temperature)
        recording = None
        if self.records_support and temperature > 0:
            recording = RecordingWarper(settings)
            settings.update(temperature=1.0, top_k=0, top_p=1.0, min_p=None)  # so that nothing is applied twice
        ending = self.ending()
        with self.sampling(seed, settings):
            for start in range(0, len(encoded), batch_size):
                report = self._progress(start, len(encoded))
                batch = self._generate_batch(encoded[start : start + batch_size], recording, ending, report)
                responses += batch
                if recording is not None:
                    supports += recording.pop([len(response.tokens) for response in batch])
                if report is not None:
                    report(len(batch))
        return samples_of(prompts, encoded, responses, self.tokenizer, supports=None if recording is None else supports)

    def ending(self) -> Ending:
        """Return what ends responses."""
        return Ending(self.eos_ids, self.tokenizer, self.stop_strings)

    def _progress(self, before: int, total: int) -> Callable[[int], None] | None:
        """Return a function that reports how many completions of a batch are finished, after those before it."""
        on_progress = self.on_progress
        return None if on_progress is None else lambda done: on_progress(before + done, total)

    @contextmanager
    def sampling(self, seed: int, settings: GenerationConfig) -> Iterator[None]:
        """Prepare the policy for sampling within a context: evaluation mode, generation settings, seed, attention."""
        own_settings, self.policy.generation_config = self.policy.generation_config, settings
        training = self.policy.training
        self.policy.eval()
        try:
            cuda = [self.policy.device] if self.policy.device.type == "cuda" else []
            with torch.random.fork_rng(devices=cuda), use_attention(self.policy, self.attention):
                torch.manual_seed(seed)
                yield
        finally:
            self.policy.generation_config = own_settings
            self.policy.train(training)

    def _generate_batch(
        self,
        encoded: list[list[int]],
        recording: RecordingWarper | None,
        ending: Ending,
        report: Callable[[int], None] | None,
    ) -> list[Response]:
        width = max(map(len, encoded))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded], device=self.policy.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=self.policy.device)
        stop = StopAtStrings(ending, width) if ending.stop_strings else None
        progress = None if report is None else ReportProgress(report, ending, width, stop)
        # synced_gpus=False: each process samples for as long as its own responses take.
        output = cast(Any, self.policy).generate(
            input_ids=input_ids,
            attention_mask=mask,
            logits_processor=LogitsProcessorList([] if recording is None else [recording]),
            stopping_criteria=StoppingCriteriaList([each for each in (stop, progress) if each is not None]),
            synced_gpus=False,
        )
        return [ending.cut(row) for row in output[:, width:].tolist()]

    def _settings(self, temperature: float) -> GenerationConfig:
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            truncation = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p or None}
            sampling = {"do_sample": True, "temperature": temperature, **truncation}
        return GenerationConfig(
            max_new_tokens=self.max_completion_length,
            eos_token_id=sorted(self.eos_ids),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            cache_implementation=self.cache_implementation,
            **sampling,
            **self.generation_kwargs,
        )


class RecordingWarper(LogitsProcessor):
    """Applies transformers' own temperature and truncation, in its order, and records the tokens that are left.

    Args:
        settings: what ``generate()`` would otherwise apply itself.
    """

    def __init__(self, settings: GenerationConfig) -> None:
        self.warpers = LogitsProcessorList()
        if settings.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p:
            self.warpers.append(MinPLogitsWarper(settings.min_p))
        self.recorder = SupportRecorder()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Truncate the scores ``[B, V]`` of one step."""
        truncated = cast(torch.FloatTensor, self.warpers(input_ids, scores))
        self.recorder.add(range(len(truncated)), truncated > -torch.inf)
        return truncated

    def pop(self, lengths: Sequence[int]) -> list[Support]:
        """Return the supports of a batch whose responses have these lengths, and forget them."""
        recorder, self.recorder = self.recorder, SupportRecorder()
        return recorder.supports(dict(enumerate(lengths)))
