"""Recipes: YAML files that describe a run, and the trainer that one describes.

These are a recipe's keys; what it lacks has the default of :class:`sppo.SPPOTrainer`:

    model: Qwen/Qwen2.5-1.5B-Instruct       # folder, hub name, or module:function -> (model, tokenizer)
    model_kwargs: {}                        # of from_pretrained, or of the function
    critic: Qwen/Qwen2.5-0.5B-Instruct      # the same forms, or a mapping of model and keyword arguments
    train_dataset: {name: train.parquet, drop_duplicates: true}   # what sppo.data.load_prompts takes
    eval_dataset: test.parquet?limit=200
    reward: math                            # a name or module:function, or a list of them
    peft_config: {r: 16, target_modules: all-linear}   # of peft.LoraConfig: learn by an adapter
    adapter: runs/before                    # a folder with an adapter, which the model gets
    args: {learning_rate: 1e-6}             # fields of SPPOConfig; output_dir is runs/<recipe> unless given
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sppo._utils import nearest

# torch, transformers and datasets are imported where they are needed, so that --help and wrong input answer at once.
if TYPE_CHECKING:
    from sppo import SPPOConfig, SPPOTrainer

RECIPES = Path(__file__).with_name("recipes")
_MODEL = "a folder, a hub name or module:function"
_DATASET = "a source of prompts or a mapping with it under 'name'"
_KINDS: dict[str, tuple[type | types.UnionType, str]] = {
    "model": (str, _MODEL),
    "model_kwargs": (dict, "a mapping of keyword arguments"),
    "critic": (str | dict, f"{_MODEL}, or a mapping with that under 'model'"),
    "train_dataset": (str | dict, _DATASET),
    "eval_dataset": (str | dict, _DATASET),
    "reward": (str | list, "a reward's name or module:function, or a list of them"),
    "peft_config": (dict, "a mapping of peft.LoraConfig's arguments"),
    "adapter": (str, "a folder with an adapter"),
    "args": (dict, "a mapping of settings"),
}
KEYS = tuple(_KINDS)

Recipe = dict[str, Any]


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """A recipe from a YAML file, or a shipped one by its name.

    Raises:
        ValueError: there is no such recipe, it is no mapping, it has an unknown key, or a value of the wrong kind.
    """
    path = Path(name) if Path(name).is_file() else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(
            f"no recipe {name!r}{nearest(name, shipped_recipes())}; give a YAML file or one of {shipped_recipes()} "
            "(to sppo eval also a run's folder)"
        )
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {str(path)!r} is not UTF-8 text ({error}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {str(path)!r} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {str(path)!r} holds {recipe!r}; give a mapping with the keys {', '.join(KEYS)}")
    if "reward_funcs" in recipe:
        recipe["reward"] = recipe.pop("reward_funcs")
    for key, value in recipe.items():
        if key not in KEYS:
            hint = nearest(str(key), KEYS)
            raise ValueError(f"recipe {str(path)!r} has no key {key!r}{hint}; known: {', '.join(KEYS)}")
        _check_kind(key, value)
    recipe["args"] = {"output_dir": f"runs/{path.stem}", **(recipe.get("args") or {})}
    return recipe


def _check_kind(key: str, value: Any) -> None:
    kind, meaning = _KINDS[key]
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{key} must be {meaning}, got {value!r}")


def override(recipe: Recipe, name: str, text: str) -> None:
    """Set a value of a recipe: ``model``, ``train_dataset.size``, or a field of SPPOConfig.

    Raises:
        ValueError: the type differs from that of the value it replaces, or is not the key's.
    """
    head, *rest = {"reward_funcs": "reward"}.get(name, name).split(".")
    if head not in KEYS:
        recipe["args"][name] = text  # a field of SPPOConfig: its own type tells what the text means
        return
    if not rest:
        value = yaml.safe_load(text)
        _check_kind(head, value)
        recipe[head] = {**recipe["args"], **(value or {})} if head == "args" else value
        return
    if not isinstance(recipe.get(head), dict):
        recipe[head] = {} if recipe.get(head) is None else {"model" if head == "critic" else "name": recipe[head]}
    node = recipe[head]
    for key in rest[:-1]:
        node = node.setdefault(key, {})
    old = node.get(rest[-1])
    known = isinstance(old, bool | int | float) and head != "args"
    node[rest[-1]] = convert(name, text, type(old)) if known else text if head == "args" else yaml.safe_load(text)


def config_from(values: dict[str, Any]) -> SPPOConfig:
    """SPPOConfig from a recipe's or the command line's values, each converted to its field's type.

    Raises:
        ValueError: an unknown field, or a value of the wrong type.
    """
    from sppo import SPPOConfig

    kinds = typing.get_type_hints(SPPOConfig)
    fields = [name for name, field in SPPOConfig.__dataclass_fields__.items() if field.init]
    for name in values:
        if name not in fields:
            raise ValueError(f"no setting or recipe key {name!r}{nearest(name, [*fields, *KEYS])}")
    return SPPOConfig(**{name: convert(name, value, kinds[name]) for name, value in values.items()})


def convert(name: str, value: Any, kind: Any) -> Any:
    """A value from YAML (where 1e-5 is text) or the command line as a field's type.

    Raises:
        ValueError: it is not one.
    """
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    kinds = sorted(typing.get_args(kind) if union else [kind], key=lambda option: option is str)
    if types.NoneType in kinds and (value is None or (str not in kinds and value in ("none", "None", "null"))):
        return None
    for option in kinds:
        try:
            return _read_as(value, option)
        except (ValueError, TypeError, yaml.YAMLError):
            continue
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in kinds)
    raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _read_as(value: Any, kind: Any) -> Any:
    origin = typing.get_origin(kind) or kind
    if origin is Any:
        return value
    if origin in (list, dict, bool) and isinstance(value, str):
        value = yaml.safe_load(value)
    if origin is list and isinstance(value, list):
        inner = typing.get_args(kind) or (Any,)
        return [_read_as(item, inner[0]) for item in value]
    if origin in (int, float):
        number = origin(value)
        if not isinstance(value, bool) and (isinstance(value, str) or number == value):
            return number
    elif isinstance(origin, type) and issubclass(origin, Enum):
        return origin(value)
    elif isinstance(origin, type) and isinstance(value, origin):
        return value
    raise ValueError


def build_trainer(recipe: Recipe) -> SPPOTrainer:
    """The trainer that a recipe describes; what fails fast comes first."""
    for key in ("model", "reward"):
        if not recipe.get(key):
            raise ValueError(f"the recipe has no {key!r}; give --{key}")
    args = config_from(recipe["args"])

    from transformers import set_seed

    from sppo import SPPOTrainer
    from sppo.data import load_prompts
    from sppo.rewards import resolve

    rewards = [
        resolve(spec) for spec in (recipe["reward"] if isinstance(recipe["reward"], list) else [recipe["reward"]])
    ]
    data = {key: load_prompts(recipe[key]) for key in ("train_dataset", "eval_dataset") if recipe.get(key) is not None}
    set_seed(args.seed)  # of weights that a function makes
    model, tokenizer = load_model(recipe["model"], recipe.get("model_kwargs") or {})
    if recipe.get("adapter"):
        from sppo.models.lora import load_adapter

        model = load_adapter(model, recipe["adapter"])
    trainer = SPPOTrainer(
        model,
        rewards,
        args=args,
        critic=_load_critic(recipe.get("critic")),
        processing_class=tokenizer,
        peft_config=_lora(recipe.get("peft_config")),
        **data,
    )
    trainer.recipe = recipe
    return trainer


def load_model(spec: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer from a folder, a hub name, or a function that makes both."""
    if ":" in spec and not Path(spec).exists():
        made = _call(spec, settings)
        if not isinstance(made, tuple) or len(made) != 2:
            raise ValueError(f"model {spec!r} gave {type(made).__name__}; the function returns (model, tokenizer)")
        return made

    from sppo.models.policy_io import from_folder

    try:
        return from_folder(spec, **settings), load_tokenizer(spec, settings)
    except OSError as error:
        raise ValueError(
            f"model {spec!r} could not be loaded: no such folder, or a file is missing in it, and the hub did not give "
            f"it ({str(error).splitlines()[0]})"
        ) from error


def load_tokenizer(spec: str, settings: dict[str, Any]) -> Any:
    """The tokenizer of a folder or hub name, given the keyword arguments of its model."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    shared = ("gguf_file", "revision", "subfolder", "token", "trust_remote_code", "cache_dir")
    kwargs = {key: settings[key] for key in shared if key in settings}
    config = Path(spec, "tokenizer_config.json")
    kind = json.loads(config.read_text()).get("tokenizer_class") if config.is_file() else None
    # For a tokenizer of no model's class AutoTokenizer takes the class, and the special tokens, of the model beside it.
    generic = kind in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(spec, **kwargs)


def _load_critic(spec: str | dict[str, Any] | None) -> Any:
    if spec is None or (isinstance(spec, str) and ":" not in spec):
        return spec
    settings = dict(spec) if isinstance(spec, dict) else {"model": spec}
    name = settings.pop("model", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"the critic's model must be {_MODEL}, got {name!r}")
    if ":" in name:
        return _call(name, settings)

    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        name, **{"num_labels": 1, "dtype": torch.float32, **settings}
    )


def _lora(settings: dict[str, Any] | None) -> Any:
    if settings is None:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})
    except TypeError as error:
        known = ", ".join(inspect.signature(LoraConfig).parameters)
        raise ValueError(
            f"peft_config {settings!r} does not fit peft.LoraConfig ({error}); it takes {known}"
        ) from error


def _call(spec: str, settings: dict[str, Any]) -> Any:
    from sppo._utils import import_object

    return import_object(spec)(**settings)
