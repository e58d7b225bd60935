"""The policy moves little until its gradients agree; noise does not get it moving."""

import pytest
import torch
from tiny_run import changed, logged, make, snapshot

from sppo.agreement import UNTRUSTED_RATE, standard_errors, watch
from sppo.rollout.stream import Progress


def run(gradients, least=3.5, optimizer=torch.optim.Adam):
    """Updates with the given gradients; the progress after each."""
    parameter = torch.nn.Parameter(torch.zeros(gradients.shape[1]))
    adam, progress, trusted = optimizer([parameter], lr=1e-3), Progress(), []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        if not progress.trusted:
            watch(progress, adam, [parameter], least)
        adam.step()
        trusted.append(progress.trusted)
    return progress, trusted


def test_noise_is_not_trusted_and_a_signal_is():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 300, 50, generator=generator)
    opened = sum(run(each)[0].trusted for each in noise)
    assert opened <= 2  # of 40 runs with 300 updates each
    signal = noise[:, :40] + 0.4 * torch.ones(50)  # a tenth of the gradient's energy
    updates = [run(each)[1].index(True) for each in signal]
    assert 10 <= sum(updates) / len(updates) <= 20


def test_the_statistic_is_the_one_described():
    gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    progress, _ = run(gradients)
    mean = 0.9 * torch.tensor([1.0, 0.0]) + torch.tensor([1.0, 1.0])  # Adam's, times 10
    cosines = torch.stack([torch.tensor(0.5).sqrt(), mean[1] / mean.norm()])
    assert standard_errors(progress) == pytest.approx((cosines.sum() / cosines.square().sum().sqrt()).item())
    assert (progress.cosines, progress.trusted) == (2, False)


def test_without_a_mean_of_gradients_there_is_nothing_to_wait_for():
    for settings in ({}, {"momentum": 0.9}):
        plain = lambda p, lr, settings=settings: torch.optim.SGD(p, lr=lr, **settings)
        assert run(torch.ones(2, 4), optimizer=plain)[1] == [1, 1]


def test_the_policy_is_slow_until_then(tmp_path):
    moved = {}
    for least in (0.0, 1e9):
        trainer = make(tmp_path, max_steps=1, min_agreement=least, lr_scheduler_type="linear")
        before = snapshot(trainer.model)
        trainer.train()
        now = trainer.model.state_dict()
        moved[least] = {part: sum((now[n] - t).abs().sum().item() for n, t in before.items() if n.startswith(part))
                        for part in ("policy", "critic")}  # fmt: skip
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}  # the schedule goes on undisturbed
    assert moved[1e9]["policy"] == pytest.approx(UNTRUSTED_RATE * moved[0.0]["policy"], rel=1e-2)
    assert moved[1e9]["critic"] == pytest.approx(moved[0.0]["critic"], rel=1e-4)


def test_agreement_is_logged_until_it_is_reached(tmp_path):
    trainer = make(tmp_path, max_steps=30, per_device_train_batch_size=32, min_agreement=1.0)
    trainer.train()
    found = logged(trainer, "gradient_agreement")
    assert found[-1] >= 1.0
    assert 4 <= len(found) < 30


def test_iterations_on_the_same_samples_are_no_evidence(tmp_path):
    trainer = make(tmp_path, max_steps=8, num_iterations=4, min_agreement=1e9)
    trainer.train()
    assert len(logged(trainer, "gradient_agreement")) == 2  # one for each rollout
    assert trainer.experience.progress.cosines == 1  # the first had no mean to be compared with


def test_a_resumed_run_goes_on_watching(tmp_path):
    trainer = make(tmp_path, max_steps=6, save_strategy="steps", save_steps=3, min_agreement=1e9)
    trainer.train()
    again = make(tmp_path, max_steps=6, save_strategy="steps", save_steps=3, min_agreement=1e9)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.experience.progress == trainer.experience.progress
    assert changed(snapshot(trainer.model), again.model) == []
