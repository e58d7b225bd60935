"""docs/reference/metrics.md lists exactly the metrics that a run logs."""

import re
from pathlib import Path

import datasets
from tiny_run import DATASET, make

from sppo import HFRollout, Sample

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/reference/metrics.md").read_text().splitlines()
    if line.startswith("| `")
]
OF_TRANSFORMERS = {"step", "total_flos", "train_loss", "train_runtime"}  # added to entries, or logged once at the end


class Engine(HFRollout):
    """Reports log-probabilities, as engines with their own kernels do."""

    def generate(self, *args, **kwargs):
        samples = super().generate(*args, **kwargs)
        for sample in samples:
            sample.logprobs = [-1.0] * len(sample.response_ids)
        return samples


class Masking:
    """Returns responses of two turns."""

    def generate(self, prompts, **settings):
        facts = {"completion": "a", "prompt_ids": [5], "response_ids": [6, 7, 1], "mask": [True, False, True]}
        return [Sample(prompt=prompt, truncated=False, **facts) for prompt in prompts]


def test_a_run_logs_what_the_page_lists(tmp_path):
    def has_a(completions, log_metric, **_):
        log_metric("NAME", 1.0)
        return [float("a" in completion) for completion in completions]

    trainer = make(
        tmp_path,
        has_a,
        max_steps=2,
        steps_per_generation=2,
        beta=0.1,
        top_k=5,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=datasets.Dataset.from_dict(DATASET[:4]),
        rollout_engine=f"{__file__}:Engine",
    )
    dapo = make(tmp_path / "dapo", has_a, algorithm="dapo", overlong_buffer=2, per_device_train_batch_size=16)
    chosen = make(tmp_path / "chosen", has_a, prompt_value_range=[0.1, 0.9], max_steps=1)
    played = make(tmp_path / "played", has_a, max_steps=1)
    played.rollouts.sampler.episodes.engine = Masking()
    runs = (trainer, dapo, chosen, played)
    for run in runs:
        run.train()
    logged = {
        name.replace("rewards/has_a", "rewards/NAME")
        for run in runs
        for entry in run.state.log_history
        for name in entry
        if not name.endswith("_per_second") or name == "tokens_per_second"
    }
    listed = {name for row in ROWS for name in re.findall(r"`([^`]+)`", row[0])}
    assert logged - OF_TRANSFORMERS == listed


def test_each_metric_occurs_in_its_source():
    """The name, or what is left of it without a prefix for policy, critic, phase or evaluation."""
    for names, _, _, source in ROWS:
        path = ROOT / source.strip("`")
        if not path.exists():
            assert source == "transformers"
            continue
        text = "".join(file.read_text() for file in ([path] if path.is_file() else path.glob("*.py")))
        for name in re.findall(r"`([^`]+)`", names):
            name = name.partition("NAME")[0]
            prefixes = ("policy_", "critic_", "eval_", "seconds/")
            assert any(name.removeprefix(prefix) in text for prefix in prefixes), (name, source)
