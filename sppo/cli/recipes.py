"""Recipes: YAML files that describe a run, and the trainer built from one.

A recipe has these keys; a missing one has the default of :class:`sppo.SPPOTrainer`:

    model: Qwen/Qwen2.5-1.5B-Instruct       # folder, hub name, or module:function -> (model, tokenizer)
    model_kwargs: {}                        # keyword arguments of from_pretrained, or of the function
    critic: Qwen/Qwen2.5-0.5B-Instruct      # the same forms, or a mapping of model and keyword arguments
    train_dataset: {name: train.parquet, drop_duplicates: true}   # a source of sppo.data.load_prompts
    eval_dataset: test.parquet?limit=200
    reward: math                            # a name or module:function, or a list of them
    environment: my_environment.py:Guess    # answers the policy between its turns (sppo.rollout.environments)
    tools: [my_tools.py:search]             # functions that the policy may call
    peft_config: {r: 16, target_modules: all-linear}   # arguments of peft.LoraConfig: train an adapter
    adapter: runs/before                    # a folder with an adapter to load into the model
    args: {learning_rate: 1e-6}             # fields of SPPOConfig; output_dir defaults to runs/<recipe>

Names of code in a recipe are imported and called with the rights of the user. A recipe of someone else may therefore
name only what the package has, and functions of a .py file beside it; for the rest the user says that it is trusted.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_plus

import yaml

from sppo._utils import suggest

# torch, transformers and datasets are imported where they are needed, so that --help and errors in the input are quick.
if TYPE_CHECKING:
    from sppo import SPPOConfig, SPPOTrainer

RECIPES = Path(__file__).with_name("recipes")
_MODEL = "a folder, a hub name or module:function"
_DATASET = "a source of prompts or a mapping with it under 'name'"
_KEY_TYPES: dict[str, tuple[type | types.UnionType, str]] = {
    "model": (str, _MODEL),
    "model_kwargs": (dict, "a mapping of keyword arguments"),
    "critic": (str | dict, f"{_MODEL}, or a mapping with that under 'model'"),
    "train_dataset": (str | dict, _DATASET),
    "eval_dataset": (str | dict, _DATASET),
    "reward": (str | list, "a reward's name or module:function, or a list of them"),
    "environment": (str, "module:Class of an environment"),
    "tools": (list, "a list of module:function"),
    "peft_config": (dict, "a mapping of peft.LoraConfig's arguments"),
    "adapter": (str, "a folder with an adapter"),
    "args": (dict, "a mapping of settings"),
}
KEYS = tuple(_KEY_TYPES)

Recipe = dict[str, Any]

_CODE = re.compile(r"[^\s:]+:[A-Za-z_][\w.]*")  # module:function, path/to/file.py:function
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def shipped_recipes() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str, *, trust_code: bool = False) -> Recipe:
    """Read a recipe from a YAML file, or a shipped one by its name.

    Args:
        name: the file, or the name.
        trust_code: let a file name any code, not only that of this package and of .py files beside it.

    Raises:
        ValueError: there is no such recipe, it is not a mapping, it has an unknown key or a value of the wrong type, or
            it names code that is not trusted.
    """
    path = Path(name) if Path(name).is_file() else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(
            f"no recipe {name!r}{suggest(name, shipped_recipes())}; give a YAML file or one of {shipped_recipes()} "
            "(sppo eval also takes a run's folder)"
        )
    recipe = _read_yaml(path)
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {str(path)!r} holds {recipe!r}; give a mapping with the keys {', '.join(KEYS)}")
    if "reward_funcs" in recipe:
        recipe["reward"] = recipe.pop("reward_funcs")
    for key, value in recipe.items():
        if key not in KEYS:
            hint = suggest(str(key), KEYS)
            raise ValueError(f"recipe {str(path)!r} has no key {key!r}{hint}; known: {', '.join(KEYS)}")
        _check_type(key, value)
    if not trust_code and path.parent != RECIPES:
        _reject_code(recipe, path)
    recipe["args"] = {"output_dir": f"runs/{path.stem}", **(recipe.get("args") or {})}
    return recipe


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {str(path)!r} is not UTF-8 text ({error}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {str(path)!r} is not YAML: {error}") from error


def _reject_code(recipe: Recipe, path: Path) -> None:
    """Raise ValueError if a recipe names code other than that of a shipped recipe or of a .py file beside it."""
    shipped = {text for name in shipped_recipes() for _, text in _code_in(_read_yaml(RECIPES / f"{name}.yaml"))}
    for key, code in _code_in(recipe):
        source, _, name = code.rpartition(":")
        is_beside = source.endswith(".py") and Path(source).resolve().parent == path.resolve().parent
        if code not in shipped and not (is_beside and name.isidentifier()):
            raise ValueError(
                f"recipe {str(path)!r} has {code!r} for {key}, which runs code with your rights; if you trust the "
                "recipe, give --trust-recipe-code. A function of a .py file beside the recipe needs no such option"
            )


def _code_in(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key and the text of all in a recipe that may name code, wherever it stands."""
    if isinstance(value, dict):
        for name, item in value.items():
            path = f"{key}.{name}".lstrip(".")
            if name == "trust_remote_code" and item:
                yield path, f"trust_remote_code={item}"
            yield from _code_in(item, path)
    elif isinstance(value, list):
        for item in value:
            yield from _code_in(item, key)
    elif isinstance(value, str):
        # Options of a name may hold names too. Engines also take classes by their path: package.module.Class.
        for text in re.split(r"[?&=]", unquote_plus(value)):
            is_path = "rollout_engine_kwargs" in key and _DOTTED.fullmatch(text)
            is_data = text.startswith("reasoning_gym:") or (key == "reward" and text.startswith("model:"))
            if (_CODE.fullmatch(text) and not is_data) or is_path:
                yield key, text


def _check_type(key: str, value: Any) -> None:
    expected, description = _KEY_TYPES[key]
    if value is not None and not isinstance(value, expected):
        raise ValueError(f"{key} must be {description}, got {value!r}")


def override(recipe: Recipe, name: str, text: str) -> None:
    """Set a value of a recipe in place.

    Args:
        recipe: the recipe.
        name: a key (``model``), a path below a key (``train_dataset.size``), or a field of SPPOConfig.
        text: the new value, as given on the command line.

    Raises:
        ValueError: the value's type differs from that of the value it replaces, or is wrong for the key.
    """
    head, *rest = {"reward_funcs": "reward"}.get(name, name).split(".")
    if head not in KEYS:
        recipe["args"][name] = text  # a field of SPPOConfig; config_from converts it to the field's type
        return
    if not rest:
        value = yaml.safe_load(text)
        _check_type(head, value)
        recipe[head] = {**recipe["args"], **(value or {})} if head == "args" else value
        return
    if not isinstance(recipe.get(head), dict):
        recipe[head] = {} if recipe.get(head) is None else {"model" if head == "critic" else "name": recipe[head]}
    node = recipe[head]
    for key in rest[:-1]:
        node = node.setdefault(key, {})
    old = node.get(rest[-1])
    if head == "args":
        node[rest[-1]] = text
    elif isinstance(old, bool | int | float):
        node[rest[-1]] = convert(name, text, type(old))
    else:
        node[rest[-1]] = yaml.safe_load(text)


def config_from(values: dict[str, Any]) -> SPPOConfig:
    """Build an SPPOConfig from values of a recipe or the command line, each converted to its field's type.

    Raises:
        ValueError: an unknown field, or a value of the wrong type.
    """
    from sppo import SPPOConfig
    from sppo.presets import SETTINGS_OF_TRL

    types_of_fields = typing.get_type_hints(SPPOConfig)
    fields = [name for name, field in SPPOConfig.__dataclass_fields__.items() if field.init]
    for name in values:
        if name in SETTINGS_OF_TRL:
            raise ValueError(f"no setting {name!r}: {SETTINGS_OF_TRL[name]}")
        if name not in fields:
            raise ValueError(f"no setting or recipe key {name!r}{suggest(name, [*fields, *KEYS])}")
    return SPPOConfig(**{name: convert(name, value, types_of_fields[name]) for name, value in values.items()})


def convert(name: str, value: Any, field_type: Any) -> Any:
    """Convert a value from YAML (where 1e-5 is text) or the command line to a field's type.

    Args:
        name: the field, for the error message.
        value: the value.
        field_type: the field's annotation; of a union, ``str`` is tried last.

    Raises:
        ValueError: the value cannot be converted.
    """
    is_union = typing.get_origin(field_type) in (typing.Union, types.UnionType)
    options = sorted(typing.get_args(field_type) if is_union else [field_type], key=lambda option: option is str)
    if types.NoneType in options and (value is None or (str not in options and value in ("none", "None", "null"))):
        return None
    for option in options:
        try:
            return _parse_as(value, option)
        except (ValueError, TypeError, yaml.YAMLError):
            continue
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"{name} must be {expected}, got {value!r}")


def _parse_as(value: Any, target: Any) -> Any:
    origin = typing.get_origin(target) or target
    if origin is Any:
        return value
    if origin in (list, dict, bool) and isinstance(value, str):
        value = yaml.safe_load(value)
    if origin is list and isinstance(value, list):
        item_types = typing.get_args(target) or (Any,)
        return [_parse_as(item, item_types[0]) for item in value]
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
    """Build the trainer that a recipe describes, checking what can be checked before the models are loaded.

    Raises:
        ValueError: the recipe lacks a model or a reward, or a part of it cannot be built.
    """
    for key in ("model",) if recipe.get("environment") else ("model", "reward"):
        if not recipe.get(key):
            raise ValueError(f"the recipe has no {key!r}; give --{key}")
    args = config_from(recipe["args"])

    from transformers import set_seed

    from sppo import SPPOTrainer
    from sppo._utils import import_object
    from sppo.data import load_prompts
    from sppo.rewards import resolve

    specs = recipe.get("reward") or []
    rewards = [resolve(spec) for spec in (specs if isinstance(specs, list) else [specs])]
    environment = import_object(recipe["environment"]) if recipe.get("environment") else None
    tools = [import_object(spec) for spec in recipe.get("tools") or []]
    data = {key: load_prompts(recipe[key]) for key in ("train_dataset", "eval_dataset") if recipe.get(key) is not None}
    set_seed(args.seed)  # for weights that a module:function initializes
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
        peft_config=_lora_config(recipe.get("peft_config")),
        environment_factory=environment,
        tools=tools,
        **data,
    )
    trainer.recipe = recipe
    return trainer


def load_model(spec: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        spec: a folder, a hub name, or ``module:function`` returning ``(model, tokenizer)``.
        settings: keyword arguments of ``from_pretrained`` or of the function.

    Raises:
        ValueError: the model cannot be loaded, or the function returns something else.
    """
    if ":" in spec and not Path(spec).exists():
        loaded = _call(spec, settings)
        if not isinstance(loaded, tuple) or len(loaded) != 2:
            raise ValueError(
                f"model {spec!r} returned {type(loaded).__name__}; a function must return (model, tokenizer)"
            )
        return loaded

    from sppo.models.policy_io import from_folder

    try:
        return from_folder(spec, **settings), load_tokenizer(spec, settings)
    except OSError as error:
        raise ValueError(
            f"model {spec!r} cannot be loaded: it is not a complete model folder, and the download from the hub failed "
            f"({str(error).splitlines()[0]}); give a folder, a hub name or module:function"
        ) from error


def load_tokenizer(spec: str, settings: dict[str, Any]) -> Any:
    """Load the tokenizer of a folder or hub name with the keyword arguments of its model that apply to it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    shared = ("gguf_file", "revision", "subfolder", "token", "trust_remote_code", "cache_dir")
    kwargs = {key: settings[key] for key in shared if key in settings}
    config = Path(spec, "tokenizer_config.json")
    class_name = json.loads(config.read_text()).get("tokenizer_class") if config.is_file() else None
    # For a generic tokenizer, AutoTokenizer would use the class and special tokens of the model in the same folder.
    is_generic = class_name in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if is_generic else AutoTokenizer).from_pretrained(spec, **kwargs)


def _load_critic(spec: str | dict[str, Any] | None) -> Any:
    if spec is None or (isinstance(spec, str) and ":" not in spec):
        return spec
    settings: dict[str, Any] = dict(spec) if isinstance(spec, dict) else {"model": spec}
    name = settings.pop("model", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"the critic's model must be {_MODEL}, got {name!r}")
    if ":" in name:
        return _call(name, settings)

    import torch
    from transformers import AutoModelForSequenceClassification

    from sppo.models.quantization import bitsandbytes_config

    if isinstance(quantization := settings.get("quantization_config"), dict):
        settings["quantization_config"] = bitsandbytes_config(quantization)
    return AutoModelForSequenceClassification.from_pretrained(
        name, **{"num_labels": 1, "dtype": torch.float32, **settings}
    )


def _lora_config(settings: dict[str, Any] | None) -> Any:
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
