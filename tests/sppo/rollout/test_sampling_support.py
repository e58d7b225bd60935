"""Recording, checking and packing what a truncated sampler kept."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from tiny_run import make

from sppo.rollout import HFRollout, Sample
from sppo.rollout.batching import pack_policy_batch
from sppo.rollout.support import SupportRecorder, SupportStats, is_truncated, support_metrics, take_supports
from sppo.settings import SPPOSettings
from sppo_kernels import Support

TRUNCATED = SPPOSettings(top_k=3)


def a_sample(response, support=None, **facts):
    return Sample("", "", [5, 6], response, truncated=False, advantage=torch.tensor(1.0), support=support, **facts)


def ranges(support):
    ids, offsets = support
    assert (ids.dtype, offsets.dtype, ids.device.type) == (torch.int32, torch.int64, "cpu")
    return [ids[a:b].tolist() for a, b in pairwise(offsets)]


@pytest.mark.parametrize(
    ("settings", "truncated"),
    [((1.0, 0, None), False), ((0.9, 0, None), True), ((1.0, 5, None), True), ((1.0, 0, 0.1), True)],
)
def test_which_settings_truncate(settings, truncated):
    assert is_truncated(*settings) == truncated


@given(st.data())
def test_each_sequence_gets_its_own_steps_in_order(data):
    """Sequences begin and end at different steps, in any row, as in continuous batching."""
    lengths = data.draw(st.lists(st.integers(1, 4), max_size=4), "lengths")
    extra = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)), "extra steps")
    kept = {
        i: [[v for v in range(4) if data.draw(st.booleans())] for _ in range(n + more)]
        for i, (n, more) in enumerate(zip(lengths, extra, strict=True))
    }
    recorder, left = SupportRecorder(), {i: list(steps) for i, steps in kept.items()} | {"warmup": [[1, 2], [3]]}
    while left:
        rows = data.draw(st.lists(st.sampled_from(list(left)), min_size=1, unique=True), "rows")
        mask = torch.zeros(len(rows), 5, dtype=torch.bool)
        for row, name in enumerate(rows):
            mask[row, left[name].pop(0)] = True
            if not left[name]:
                del left[name]
        recorder.add(rows, mask)
    supports = recorder.supports(dict(enumerate(lengths)))
    assert [ranges(support) for support in supports] == [kept[i][:n] for i, n in enumerate(lengths)]


def test_a_step_that_was_not_recorded_raises():
    recorder = SupportRecorder()
    recorder.add(["a"], torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="support of 1 of 2 tokens of sequence 'a' was recorded; set replay_sampl"):
        recorder.supports({"a": 2})


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ([[7], [9, 9]], ", for a completion of 2 tokens: .*label 8 of token 1 is not among"),
        ([[7], [8, 28]], r", for a completion of 2 tokens: .*in \[0, 28\), got 28 in the support of token 1"),
        (torch.tensor([7, 8]), " must be a list with the token ids that the sampler kept for each token"),
    ],
)
def test_an_invalid_support_raises(support, message):
    samples = [a_sample([7, 8], Support.of([[3, 7], []])), a_sample([7, 8], support)]
    with pytest.raises(ValueError, match=f"rollout engine MyEngine: the support of sample 1{message}"):
        take_supports(samples, "MyEngine", TRUNCATED, 28)


@pytest.mark.parametrize("support", [[[3, 7], []], (np.array([3, 7]), np.array([0, 2, 2]))])
def test_an_engine_may_return_lists_and_arrays(support):
    sample = a_sample([7, 8], support)
    take_supports([sample], "MyEngine", TRUNCATED, 28)
    assert ranges(sample.support) == [[3, 7], []]


def test_supports_for_some_samples_raise():
    """Also where they would be in different micro-batches."""
    samples = [a_sample([7], Support.of([[7]])), a_sample([8]), a_sample([9])]
    with pytest.raises(ValueError, match="MyEngine returned no support for sample 1 and 1 others of 3; return one for"):
        take_supports(samples, "MyEngine", TRUNCATED, 28)


@pytest.mark.parametrize("correction", ["sequence_truncate", "sequence_mask"])
def test_log_probabilities_without_a_support_do_not_fit_a_sequence_weight(correction):
    settings = SPPOSettings(top_k=3, rollout_correction=correction)
    with pytest.raises(
        ValueError, match=f"{correction}.*MyEngine returned log-probabilities, and no support.*return Sample.support"
    ):
        take_supports([a_sample([7], logprobs=[-0.1])], "MyEngine", settings, 28)
    take_supports([a_sample([7])], "MyEngine", settings, 28)  # no log-probabilities, no weight
    settings.replay_sampling_support = False
    with pytest.raises(ValueError, match=correction):
        take_supports([a_sample([7], Support.of([[7]]), logprobs=[-0.1])], "MyEngine", settings, 28)


def test_a_row_that_was_not_cut_is_an_empty_range():
    recorder = SupportRecorder()
    recorder.add(["a", "b"], torch.tensor([[True, True, True], [True, False, True]]))
    assert [ranges(support) for support in recorder.supports({"a": 1, "b": 1})] == [[[]], [[0, 2]]]


def test_valid_supports_pass():
    kept = [[[7], [8, 9]], [[], []], [[], [0, 8]]]
    take_supports([a_sample([7, 8], Support.of(each)) for each in kept], "MyEngine", TRUNCATED, 28)
    take_supports([], "MyEngine", TRUNCATED, 28)


def test_an_engine_without_supports_is_warned_about_once(monkeypatch):
    """Only where the settings truncate, and the support is to be used."""
    said = []
    monkeypatch.setattr("sppo.rollout.support.logger.warning_once", said.append)
    take_supports([a_sample([7])], "Blind", SPPOSettings(), 28)
    take_supports([a_sample([7])], "Blind", SPPOSettings(top_k=3, replay_sampling_support=False), 28)
    take_supports([a_sample([7], Support.of([[7]]))], "Seeing", TRUNCATED, 28)
    assert not said
    take_supports([a_sample([7])], "Blind", TRUNCATED, 28)
    assert len(said) == 1
    assert "rollout engine Blind returned no support" in said[0]
    assert "replay_sampling_support=False" in said[0]


def test_supports_that_are_not_to_be_used_are_dropped():
    sample = a_sample([7], Support.of([[7]]))
    take_supports([sample], "MyEngine", SPPOSettings(top_k=3, replay_sampling_support=False), 28)
    assert sample.support is None


def test_a_micro_batch_concatenates_supports():
    samples = [a_sample([7, 8], Support.of([[3, 7], []])), a_sample([9], Support.of([[9]]))]
    batch = pack_policy_batch(samples)
    assert ranges((batch["support_ids"], batch["support_offsets"])) == [[3, 7], [], [9]]
    assert "support_ids" not in pack_policy_batch([a_sample([7])])


@pytest.mark.parametrize("samples", [[], [a_sample([7], Support.of([[]]))], [a_sample([7], Support.of([[7, 8]]))]])
def test_a_saved_micro_batch_keeps_its_keys_and_types(samples):
    batch = pack_policy_batch(samples)
    loaded = load(save(batch))
    assert ("support_ids" in batch) == bool(samples)
    assert {name: (t.dtype, t.tolist()) for name, t in loaded.items()} == {
        name: (t.dtype, t.tolist()) for name, t in batch.items()
    }


def test_metrics_count_an_uncut_token_as_the_vocabulary():
    stats = [
        SupportStats.of(a_sample([7, 8], Support.of([[3, 7], []])), vocab_size=28),
        SupportStats.of(a_sample([9], Support.of([[9]])), vocab_size=28),
        SupportStats.of(a_sample([9]), vocab_size=28),
    ]
    assert support_metrics(stats) == {
        "support_size": pytest.approx(31 / 3),
        "support_single_share": pytest.approx(1 / 3),
    }
    assert support_metrics([None]) == {}


class Wrong(HFRollout):
    """Returns a support without the response token."""

    def generate(self, *args, **kwargs):
        samples = super().generate(*args, **kwargs)
        samples[3].support = Support.of([[25 if token != 25 else 26] for token in samples[3].response_ids])
        return samples


def rollout(tmp_path, **settings):
    trainer = make(tmp_path, **settings)
    return trainer, [batch for update in trainer.rollouts._collect(0) for batch in update.micro_batches]


def test_a_rollout_checks_its_supports(tmp_path):
    with pytest.raises(ValueError, match=r"rollout engine Wrong: the support of sample 3.* is not among"):
        rollout(tmp_path, top_k=3, rollout_engine=f"{__file__}:Wrong")


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_a_rollout_carries_supports_and_measures_them(tmp_path, settings):
    trainer, (batch,) = rollout(tmp_path, **settings)
    sizes = batch["support_offsets"].diff().float()
    assert len(sizes) == len(batch["response_ids"])
    metrics = trainer.meter.read(list)
    assert metrics["support_size"] == pytest.approx(sizes.mean())
    assert metrics["support_single_share"] == pytest.approx((sizes == 1).float().mean())


@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "replay_sampling_support": False}])
def test_a_rollout_without_supports(tmp_path, settings):
    trainer, (batch,) = rollout(tmp_path, **settings)
    assert "support_ids" not in batch
    assert "support_size" not in trainer.meter.read(list)


def test_training_without_replay_is_warned_about(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("sppo.rollout.generation.logger.warning", said.append)
    make(tmp_path, top_k=3)
    make(tmp_path, replay_sampling_support=False)
    assert not said
    make(tmp_path, top_k=3, replay_sampling_support=False)
    (text,) = said
    assert "top_k=3" in text
    assert "arXiv 2512.02556, section 3.1" in text
