"""The model card of a run: what the model is, its recipe, what came of it, how to load it, whom to cite."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import TrainerState

from sppo._utils import METRICS_FILE, atomic_write, read_lines
from sppo.algorithms import Algorithm
from sppo.config import SPPOConfig
from sppo.models.actor_critic import ActorCritic
from sppo.models.lora import has_adapter
from sppo.rewards import Reward
from sppo_kernels import __version__

TAGS = ("sppo-kernels", "reinforcement-learning", "rlvr", "generated_from_trainer")
_LIBRARIES = ("transformers", "torch", "datasets", "accelerate")
_OUTPUT_SETTINGS = (
    "output_dir",
    "run_name",
    "project",
    "report_to",
    "trackio_",
    "push_to_hub",
    "hub_",
    "logging_",
    "log_",
    "save_",
)
_MACHINE_SETTINGS = (
    "disable_tqdm",
    "local_rank",
    "resume_from_checkpoint",
    "dataloader_",
    "accelerator_config",
    "ignore_data_skip",
)
_NOT_RECIPE = _OUTPUT_SETTINGS + _MACHINE_SETTINGS
"""Prefixes of the names of settings that a recipe does not repeat: output, secrets of the hub, the machine."""


class TrainedRun(Protocol):
    """The parts of :class:`sppo.SPPOTrainer` that its model card reads."""

    args: SPPOConfig
    algorithm: Algorithm
    reward_funcs: list[Reward]
    recipe: dict[str, Any] | None
    state: TrainerState
    train_dataset: Any

    @property
    def actor_critic(self) -> ActorCritic:
        """The module that was trained."""


def write_model_card(
    trainer: TrainedRun,
    path: Path,
    *,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    license: str | None = None,
    language: str | None = None,
) -> None:
    """Write the model card of a trained run; the arguments are those of ``transformers.Trainer.create_model_card``.

    Args:
        trainer: a trainer after training.
        path: the file.
        model_name: title of the card; None for the name of ``output_dir``.
        finetuned_from: hub name of the model before training; None for where it was loaded from.
        dataset_tags: hub names of the training data; None for those in the recipe.
        dataset: names of the training data in the card's text.
        tags: additional tags.
        license, language: left out if None.
    """
    names, hub_names, more = ([x] if isinstance(x, str) else x or [] for x in (dataset, dataset_tags, tags))
    card = model_card(
        trainer,
        model_name=model_name,
        base_model=finetuned_from,
        datasets=hub_names,
        dataset_names=names,
        tags=more,
        license=license,
        language=language,
    )
    with atomic_write(path) as staged:
        staged.write_text(str(card), encoding="utf-8")


def model_card(
    trainer: TrainedRun,
    *,
    model_name: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    dataset_names: Sequence[str] = (),
    tags: Sequence[str] = (),
    license: str | None = None,
    language: str | None = None,
) -> ModelCard:
    """The card of what a trainer has trained.

    Args:
        trainer: its settings, rewards and log, and its ``recipe`` where it was built from one.
        model_name: the title; None: the name of ``output_dir``.
        base_model: what the policy was before; None: where it was loaded from.
        datasets: names on the hub; none: the recipe's, where it names any.
        dataset_names: what to call them in the text; none: as they are named there, or in the recipe.
        tags: besides the usual ones.
        license, language: left out where None.
    """
    recipe = recipe_of(trainer)
    base = base_model or recipe.get("model")
    adapted = has_adapter(trainer.actor_critic.policy)
    data = ModelCardData(
        library_name="peft" if adapted else "transformers",
        pipeline_tag="text-generation",
        base_model=base if is_hub_name(base) else None,
        datasets=list(datasets) or [name for name in _sources(recipe) if is_hub_name(name)] or None,
        tags=sorted({*TAGS, str(trainer.args.algorithm).rpartition(":")[2], *tags}),
        license=license,
        language=language,
        model_name=model_name,
    )
    folder = Path(trainer.args.output_dir or ".")
    sections = [
        f"# {model_name or folder.absolute().name}",
        _what_it_is(trainer, base, dataset_names or datasets or _sources(recipe)),
        _results(read_lines(folder / METRICS_FILE) or trainer.state.log_history),
        "![How it learned](learning_curve.png)" if (folder / "learning_curve.png").is_file() else "",
        (_USE_ADAPTER if adapted else _USE) + (_USE_CRITIC if trainer.algorithm.critic else ""),
        _recipe(recipe, whole=trainer.recipe is not None),
        _versions(),
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
    return ModelCard(f"---\n{data}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def recipe_of(trainer: TrainedRun) -> dict[str, Any]:
    """What ``sppo train`` would repeat the run with: the recipe's keys, and the settings that are no defaults.

    The algorithm's own defaults are among them. Of paths on this machine only the last part stays.
    """
    values = trainer.args.to_dict()
    defaults = {field.name: field.default for field in dataclasses.fields(SPPOConfig)}
    settings = {
        name: value
        for name, value in values.items()
        if not name.startswith(_NOT_RECIPE)
        and value != defaults[name]
        and (value or defaults[name])  # some of what is left None becomes False or an empty list
    }
    name = getattr(trainer.actor_critic.policy.config, "_name_or_path", "")
    known = trainer.recipe or {"model": name or None, "reward": [reward.name for reward in trainer.reward_funcs]}
    whole = {**known, "args": {"algorithm": values["algorithm"], **settings}}
    return {key: _public(value) for key, value in whole.items() if value not in (None, {})}


def _public(value: Any) -> Any:
    """A recipe's value without the folders of this machine."""
    if isinstance(value, Mapping):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_public(each) for each in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)) else value


def _sources(recipe: Mapping[str, Any]) -> list[str]:
    source = recipe.get("train_dataset")
    name = source.get("name") if isinstance(source, Mapping) else source
    return [str(name).partition("?")[0]] if name else []


def is_hub_name(name: str | None) -> bool:
    """Whether a model or dataset is named as on the hub, ``owner/name``, and no file or folder is meant."""
    if not name or Path(name).exists() or re.search(r"\.(jsonl?|parquet|csv|txt|py)$", name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _what_it_is(trainer: TrainedRun, base: str | None, datasets: Sequence[str]) -> str:
    what = next(iter((type(trainer.algorithm).__doc__ or "").strip().splitlines()), "")
    dataset = cast(Dataset | None, trainer.train_dataset)
    prompts = f"{len(dataset):,} prompts" if dataset is not None else "prompts"
    return (
        f"{f'`{base}`' if base else 'A causal language model'}, trained by `sppo-kernels` with reinforcement learning "
        f"from verifiable rewards, on {prompts}{' of ' + _quoted(datasets) if datasets else ''}.\n\n"
        f"- Algorithm: `{trainer.args.algorithm}`. {what}\n"
        f"- Rewards: {_quoted(_public(reward.name) for reward in trainer.reward_funcs)}"
    )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _results(log: Sequence[Mapping[str, Any]]) -> str:
    """The first and the last evaluation of each set of held-out prompts."""
    rows = []
    for name in sorted({name for entry in log for name in entry if re.fullmatch(r"eval_(.+_)?success_rate", name)}):
        prefix = name.removesuffix("success_rate")
        found = [entry for entry in log if name in entry]
        for entry in {id(entry): entry for entry in (found[0], found[-1])}.values():
            rows.append(
                f"| {prefix.removeprefix('eval_').strip('_') or 'held-out prompts'} | {entry['step']:,} "
                f"| {entry[name]:.3f} | {entry[prefix + 'reward']:.3f} | {entry[prefix + 'response_length']:.0f} |"
            )
    if not rows:
        return ""
    header = "| evaluated on | after updates | solved | mean reward | mean tokens |\n|---|---|---|---|---|\n"
    return "## Results\n\n" + header + "\n".join(rows)


def _versions() -> str:
    found = [f"sppo-kernels {__version__}", *(f"{name} {version(name)}" for name in _LIBRARIES)]
    return "## Versions\n\n" + ", ".join(found)


def _recipe(recipe: Mapping[str, Any], whole: bool) -> str:
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
    how = (
        "Save it as `recipe.yaml` and run `sppo train recipe.yaml`."
        if whole
        else "The run was started from Python; what is not below was given there, or had its default."
    )
    return f"## Recipe\n\n{how}\n\n```yaml\n{text}```"


_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/repository"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""

_USE_ADAPTER = """## Use

It is an adapter beside the model that it was trained on, whose name is in `adapter_config.json`:

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "path/to/this/repository"
model = AutoPeftModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""

_USE_CRITIC = """

Its critic is beside it in the folder `critic`, a sequence classifier with one label. What it predicts is the logit plus
`config.score_bias`, which `load_critic` puts back into its head:

```python
from sppo import load_critic

critic = load_critic(folder)
```"""

_CITATION = """@article{wang2026sppo,
  title = {{SPPO}: Sequence-Level {PPO} for Long-Horizon Reasoning Tasks},
  author = {Tianyi Wang and Yixia Li and Long Li and Yibiao Chen and Shaohan Huang and Yun Chen and Peng Li and
            Yang Liu and Guanhua Chen},
  journal = {arXiv preprint arXiv:2604.08865},
  year = {2026},
}

@inproceedings{wolf2020transformers,
  title = {Transformers: State-of-the-Art Natural Language Processing},
  author = {Thomas Wolf and others},
  booktitle = {Proceedings of EMNLP: System Demonstrations},
  pages = {38--45},
  year = {2020},
}"""
