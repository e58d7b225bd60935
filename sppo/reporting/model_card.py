"""The model card of a run: the model, its results, how to load it, its recipe, versions and citations."""

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

from sppo._utils import LEARNING_CURVE_FILE, METRICS_FILE, atomic_write, read_lines
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
    "console",
    "local_rank",
    "resume_from_checkpoint",
    "dataloader_",
    "accelerator_config",
    "ignore_data_skip",
)
_NOT_RECIPE = _OUTPUT_SETTINGS + _MACHINE_SETTINGS
"""Name prefixes of settings that a recipe omits: output, hub secrets, the machine."""


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
        """The trained module."""


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
    """Create the model card of a trained run.

    Args:
        trainer: a trainer after training.
        model_name: title of the card; None for the name of ``output_dir``.
        base_model: name of the model before training; None for where it was loaded from.
        datasets: hub names of the training data; empty for those in the recipe.
        dataset_names: names of the training data in the card's text; empty for ``datasets``, or those in the recipe.
        tags: additional tags.
        license, language: left out if None.
    """
    recipe = recipe_of(trainer)
    base = base_model or recipe.get("model")
    is_adapter = has_adapter(trainer.actor_critic.policy)
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
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
        _introduction(trainer, base, dataset_names or datasets or _sources(recipe)),
        _results(read_lines(folder / METRICS_FILE) or trainer.state.log_history),
        f"![Learning curves]({LEARNING_CURVE_FILE})" if (folder / LEARNING_CURVE_FILE).is_file() else "",
        (_USE_ADAPTER if is_adapter else _USE) + (_USE_CRITIC if trainer.algorithm.critic else ""),
        _recipe(recipe, is_complete=trainer.recipe is not None),
        _versions(),
        f"## Citation\n\n```bibtex\n{_CITATION}\n```",
    ]
    return ModelCard(f"---\n{data}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def recipe_of(trainer: TrainedRun) -> dict[str, Any]:
    """Return the recipe with which ``sppo train`` repeats a run.

    It has the keys of the run's recipe, if it has one, and all settings that differ from the defaults of SPPOConfig,
    including the algorithm's defaults. Absolute paths are reduced to their last part.
    """
    values = trainer.args.to_dict()
    defaults = {field.name: field.default for field in dataclasses.fields(SPPOConfig)}
    settings = {
        name: value
        for name, value in values.items()
        if not name.startswith(_NOT_RECIPE)
        and value != defaults[name]
        and (value or defaults[name])  # some defaults of None become False or an empty list
    }
    name = getattr(trainer.actor_critic.policy.config, "_name_or_path", "")
    recipe = trainer.recipe or {"model": name or None, "reward": [reward.name for reward in trainer.reward_funcs]}
    recipe = {**recipe, "args": {"algorithm": values["algorithm"], **settings}}
    return {key: _without_folders(value) for key, value in recipe.items() if value not in (None, {})}


def _without_folders(value: Any) -> Any:
    """Return a recipe's value with absolute paths reduced to their last part."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)) else value


def _sources(recipe: Mapping[str, Any]) -> list[str]:
    source = recipe.get("train_dataset")
    name = source.get("name") if isinstance(source, Mapping) else source
    return [str(name).partition("?")[0]] if name else []


def is_hub_name(name: str | None) -> bool:
    """Return whether a name is that of a hub repository, ``owner/name``, rather than of a file or folder."""
    if not name or Path(name).exists() or re.search(r"\.(jsonl?|parquet|csv|txt|py)$", name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _introduction(trainer: TrainedRun, base: str | None, datasets: Sequence[str]) -> str:
    description = next(iter((type(trainer.algorithm).__doc__ or "").strip().splitlines()), "")
    dataset = cast(Dataset | None, trainer.train_dataset)
    prompts = f"{len(dataset):,} prompts" if dataset is not None else "prompts"
    return (
        f"{f'`{base}`' if base else 'A causal language model'}, trained by `sppo-kernels` with reinforcement learning "
        f"from verifiable rewards, on {prompts}{' of ' + _quoted(datasets) if datasets else ''}.\n\n"
        f"- Algorithm: `{trainer.args.algorithm}`. {description}\n"
        f"- Rewards: {_quoted(_without_folders(reward.name) for reward in trainer.reward_funcs)}"
    )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _results(log: Sequence[Mapping[str, Any]]) -> str:
    """Tabulate the first and the last evaluation of each set of held-out prompts."""
    rows = []
    for name in sorted({name for entry in log for name in entry if re.fullmatch(r"eval_(.+_)?success_rate", name)}):
        prefix = name.removesuffix("success_rate")
        evaluations = [entry for entry in log if name in entry]
        for entry in {id(entry): entry for entry in (evaluations[0], evaluations[-1])}.values():
            rows.append(
                f"| {prefix.removeprefix('eval_').strip('_') or 'held-out prompts'} | {entry['step']:,} "
                f"| {entry[name]:.3f} | {entry[prefix + 'reward']:.3f} | {entry[prefix + 'response_length']:.0f} |"
            )
    if not rows:
        return ""
    header = "| evaluated on | after updates | solved | mean reward | mean tokens |\n|---|---|---|---|---|\n"
    return "## Results\n\n" + header + "\n".join(rows)


def _versions() -> str:
    versions = [f"sppo-kernels {__version__}", *(f"{name} {version(name)}" for name in _LIBRARIES)]
    return "## Versions\n\n" + ", ".join(versions)


def _recipe(recipe: Mapping[str, Any], *, is_complete: bool) -> str:
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
    instructions = (
        "Save it as `recipe.yaml` and run `sppo train recipe.yaml`. Functions that it names (`module:function`) run "
        "with your rights, so those that do not belong to sppo are refused: read them before you trust them."
        if is_complete
        else "The run was started from Python. Anything not listed was passed there or had its default."
    )
    return f"## Recipe\n\n{instructions}\n\n```yaml\n{text}```"


_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/repository"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""

_USE_ADAPTER = """## Use

This is an adapter for the model named in `adapter_config.json`:

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "path/to/this/repository"
model = AutoPeftModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""

_USE_CRITIC = """

The folder `critic` contains the critic, a sequence classifier with one label. Its prediction is the logit plus
`config.score_bias`, which `load_critic` restores in the value head:

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
