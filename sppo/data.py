"""Prompt datasets for training and evaluation, from a file, a reasoning-gym task, a function or the hub.

A loaded dataset has a column ``prompt`` (text, or chat messages with ``role`` and ``content``) and the columns that
rewards read.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from sppo._utils import import_object, suggest
from sppo.rewards.sandbox.inside.reasoning_verifier import pack, reasoning_gym_task
from sppo.rewards.scoring import split_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}

logger = logging.getLogger(__name__)


def load_prompts(source: str | Mapping[str, Any] | Dataset, **options: Any) -> Dataset:
    """Load prompts in the layout that the trainer and the rewards read.

    If there is no column ``answer``, it is filled from ``reward_model["ground_truth"]``. Prompts that differ only in
    case, white space and punctuation count as equal. The number of dropped prompts is logged.

    Args:
        source: a ``.parquet``, ``.json``, ``.jsonl`` or ``.csv`` file; ``reasoning_gym:TASK``; ``module:function`` that
            returns a Dataset or a list of rows; a name on the hub; or a Dataset. Options may follow it, as in
            ``data.parquet?limit=100``. It may also be a mapping of options with the source under ``name`` (with
            ``reasoning_gym``, the task may be under ``task``).
        **options: these, and further ones for the reasoning-gym task, the function or ``datasets.load_dataset``:

            - ``split``: the split of a hub dataset; default ``"train"``.
            - ``limit``: maximum number of prompts, applied after shuffling and dropping.
            - ``seed``: seed for shuffling. A reasoning-gym task, or a function with that argument, generates its rows
              from the seed instead.
            - ``prompt_template``: text in which ``{column}`` means the row's value, ``{prompt}`` the prompt's text.
            - ``system_prompt``: the system message; converts text prompts to chat messages.
            - ``chat``: convert text prompts to chat messages.
            - ``drop_duplicates``: keep only the first of equal prompts.
            - ``drop_conflicts``: drop equal prompts whose answers differ.
            - ``exclude``: a source (the evaluation set) or a list of sources; drop the prompts that they contain.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown source or option, no column ``prompt``, an empty prompt, or no prompt at all.
    """
    source, embedded = _split(source)
    if not isinstance(source, Dataset) and not source:
        raise ValueError(
            f"dataset {embedded!r} names no source; give a file, reasoning_gym:TASK, module:function or hub name"
        )
    options = {**embedded, **options}
    common = {key: options.pop(key) for key in _COMMON_OPTIONS & options.keys() if key != "seed"}
    common |= {key: _switch(key, common[key]) for key in _SWITCHES & common.keys()}
    data, seed = _read(source, options)
    return _prepare(data, seed, name=str(source)[:80], **common)


def format_options(source: str | Mapping[str, Any] | Dataset) -> dict[str, Any]:
    """Return the options of a source that say how its prompts are sent to the model."""
    _, options = _split(source)
    found = {key: options[key] for key in ("chat", "system_prompt", "prompt_template") if key in options}
    return {key: value for key, value in found.items() if key != "chat" or _switch(key, value)}


def _split(source: str | Mapping[str, Any] | Dataset) -> tuple[str | Dataset, dict[str, Any]]:
    """Return the source itself and the options that it names."""
    options: dict[str, Any] = {}
    name: Any = source
    if isinstance(source, Mapping):
        options = dict(source)
        name = options.pop("name", "")
        if name == "reasoning_gym":
            name = f"reasoning_gym:{options.pop('task', '')}"
    if isinstance(name, str):
        name, query = split_options(name)
        options = {**query, **options}
    return name, options


def _switch(name: str, value: Any) -> bool:
    """Return the value of an option that is on or off; in text it may be written as in Python or in JSON."""
    known = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in known:
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return known[str(value).lower()]


def _read(source: str | Dataset, options: dict[str, Any]) -> tuple[Dataset, int | None]:
    """Return the rows of a source, and the seed to shuffle them with (None: keep their order)."""
    if isinstance(source, str) and source.startswith("reasoning_gym:"):
        return _reasoning_gym(source.partition(":")[2], options), None
    if isinstance(source, str) and ":" in source:
        function = import_object(source)
        if not callable(function):
            raise ValueError(f"dataset {source!r} is a {type(function).__name__}; name a function that returns rows")
        parameters = inspect.signature(function).parameters
        seed = None if "seed" in parameters else options.pop("seed", None)
        _check_options(source, options, parameters)
        rows = function(**options)
        return Dataset.from_list(rows) if isinstance(rows, list) else rows, seed
    seed = options.pop("seed", None)
    if isinstance(source, Dataset):
        _check_options("the Dataset", options, ())
        return source, seed
    path = Path(source)
    if path.suffix in FILE_FORMATS:
        _check_options(source, options, ())
        if not path.is_file():
            raise FileNotFoundError(f"dataset {source!r}: there is no such file (looked in {path.absolute().parent})")
        return _read_file(path), seed
    try:
        return load_dataset(source, **{"split": "train", **options}), seed
    except Exception as error:  # the hub's client raises errors of many libraries
        suffixes = ", ".join(FILE_FORMATS)
        raise ValueError(
            f"dataset {source!r} is not a file ({suffixes}), reasoning_gym:TASK or module:function, and loading it "
            f"from the hub failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _read_file(path: Path) -> Dataset:
    with path.open("rb") as file:
        if not any(line.strip() for line in file):
            raise ValueError(f"dataset {str(path)!r} is an empty file; give at least one prompt")
    try:
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"dataset {str(path)!r} is not a valid {path.suffix} file: {str(cause).splitlines()[0]}; fix or "
            "remove that row"
        ) from error


def _reasoning_gym(task: str, options: dict[str, Any]) -> Dataset:
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(f"reasoning_gym has no task {task!r}{suggest(task, DATASETS)}; it has {len(DATASETS)} tasks")
    _check_options(f"reasoning_gym:{task}", options, [field.name for field in fields(DATASETS[task][1])])
    options = {"seed": 0, **options}
    try:
        entries = list(reasoning_gym_task(task, json.dumps(options, sort_keys=True)))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym:{task} rejects {options}: {error}") from error
    return Dataset.from_list(
        [
            {
                "prompt": entry["question"],
                "answer": None if entry["answer"] is None else str(entry["answer"]),
                "entry": json.dumps({"task": task, "options": options, "entry": pack(entry)}, default=str),
            }
            for entry in entries
        ]
    )


def _prepare(
    data: Dataset,
    seed: int | None,
    *,
    name: str,
    limit: int | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    chat: bool = False,
    **drop_options: Any,
) -> Dataset:
    """Apply the common options to the rows of a source; ``name`` describes it in errors."""
    if limit is not None and limit < 1:
        raise ValueError(f"dataset {name!r}: limit must be at least 1, got {limit}")
    if not isinstance(data, Dataset):
        raise ValueError(
            f"dataset {name!r} is of type {type(data).__name__}; give a datasets.Dataset (of a DatasetDict, one split)"
        )
    if len(data) == 0:
        raise ValueError(f"dataset {name!r} is empty; give at least one prompt")
    if "prompt" not in data.column_names and prompt_template is None:
        raise ValueError(
            f"dataset {name!r} has no column 'prompt', it has {data.column_names}; rename one, or build prompts "
            "from its columns with prompt_template, for example '{question}'"
        )
    for i, prompt in enumerate(data["prompt"] if "prompt" in data.column_names else ()):
        if not _is_prompt(prompt):
            raise ValueError(
                f"dataset {name!r}: the prompt of row {i} is {prompt!r}; give text, or chat messages with 'content'"
            )
    if "answer" not in data.column_names and "reward_model" in data.column_names:
        data = _with_column(data, "answer", [row["ground_truth"] for row in data["reward_model"]])
    if "abality" in data.column_names and "ability" not in data.column_names:  # misspelt in public files
        data = data.rename_column("abality", "ability")

    prompts = list(data["prompt"]) if prompt_template is None else _fill_template(prompt_template, data, name)
    for i, prompt in enumerate(prompts):
        if not text_of(prompt).strip():
            raise ValueError(f"dataset {name!r}: the prompt of row {i} is empty ({prompt!r}); drop that row")
    if chat or system_prompt is not None:
        prompts = [_as_chat(prompt, system_prompt) for prompt in prompts]
    # Prompts are compared without the template.
    originals = data["prompt"] if "prompt" in data.column_names else prompts
    keep = _rows_to_keep(originals, data, name, **drop_options)
    data = _with_column(data, "prompt", prompts)
    if keep is not None:
        data = data.select(keep)
    if seed is not None:
        data = data.shuffle(seed=seed)
    return data if limit is None else data.select(range(min(limit, len(data))))


def _rows_to_keep(
    prompts: Iterable[Any],
    data: Dataset,
    name: str,
    *,
    drop_duplicates: bool = False,
    drop_conflicts: bool = False,
    exclude: Any = None,
) -> list[int] | None:
    """Return the indices of the rows that the options keep; None for all."""
    if not drop_duplicates and not drop_conflicts and exclude is None:
        return None
    keys = [_normalized(prompt) for prompt in prompts]
    keep = list(range(len(data)))
    counts = {}
    if exclude is not None:
        sources = exclude if isinstance(exclude, list | tuple) else [exclude]
        held_out = {_normalized(prompt) for other in sources for prompt in load_prompts(other)["prompt"]}
        keep, counts["also in the excluded set"] = _filter_rows(keep, lambda i: keys[i] not in held_out)
    if drop_conflicts and "answer" in data.column_names:
        answers = defaultdict(set)
        for i, answer in enumerate(data["answer"]):
            answers[keys[i]].add(answer)
        keep, counts["with conflicting answers"] = _filter_rows(keep, lambda i: len(answers[keys[i]]) == 1)
    if drop_duplicates:
        first = {keys[i]: i for i in reversed(keep)}
        keep, counts["duplicates"] = _filter_rows(keep, lambda i: first[keys[i]] == i)
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    logger.info("%s: dropped %s; %d of %d prompts left", name, dropped, len(keep), len(data))
    if not keep:
        raise ValueError(f"dataset {name!r}: nothing is left after dropping {dropped}; relax the options")
    return keep


def _filter_rows(rows: list[int], predicate: Callable[[int], bool]) -> tuple[list[int], int]:
    """Return the rows that satisfy the predicate, and the number of the others."""
    kept = [i for i in rows if predicate(i)]
    return kept, len(rows) - len(kept)


def text_of(prompt: Any) -> str:
    """Return the text of a prompt or completion; of chat messages, the content of the last one."""
    return prompt if isinstance(prompt, str) else (prompt[-1]["content"] or "") if prompt else ""


def _is_prompt(prompt: Any) -> bool:
    if prompt is None or isinstance(prompt, str):
        return True  # whether it is empty is another question
    return isinstance(prompt, list) and all(isinstance(each, Mapping) and "content" in each for each in prompt)


def _normalized(prompt: Any) -> str:
    return re.sub(r"[^\w+\-*/<>=^]", "", text_of(prompt).casefold())


def _fill_template(template: str, data: Dataset, name: str) -> list[Any]:
    columns = set(re.findall(r"\{(\w+)\}", template)) & set(data.column_names)
    if not columns:
        raise ValueError(f"prompt_template {template!r} names no column of {name!r}, which has {data.column_names}")
    prompts = []
    for row in data.select_columns(sorted(columns)):
        values = {key: text_of(value) if key == "prompt" else str(value) for key, value in row.items()}
        text = "".join(values.get(part[1:-1], part) for part in re.split(r"(\{\w+\})", template))
        chat = row.get("prompt") if not isinstance(row.get("prompt"), str) else None
        prompts.append([*chat[:-1], {**chat[-1], "content": text}] if chat else text)
    return prompts


def _as_chat(prompt: Any, system_prompt: str | None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is None:
        return messages
    return [{"role": "system", "content": system_prompt}, *(m for m in messages if m["role"] != "system")]


def _with_column(data: Dataset, name: str, values: list[Any]) -> Dataset:
    if name not in data.column_names:
        return data.add_column(name, values)
    new = f"new {name}"  # added before the old column is removed: a table without columns has no length
    return data.add_column(new, values).remove_columns(name).rename_column(new, name)


def _check_options(source: str, options: dict[str, Any], allowed: Iterable[str]) -> None:
    known = {*allowed, *_COMMON_OPTIONS}
    for name in options.keys() - known:
        raise ValueError(f"{source} has no option {name!r}{suggest(name, known)}; known: {', '.join(sorted(known))}")


_COMMON_OPTIONS = {
    "limit",
    "seed",
    "prompt_template",
    "system_prompt",
    "chat",
    "drop_duplicates",
    "drop_conflicts",
    "exclude",
}


_SWITCHES = {"chat", "drop_duplicates", "drop_conflicts"}


def check_dataset(name: str, dataset: Any, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Check that a dataset has rows and a column ``prompt`` of text or chat messages.

    Args:
        name: the argument to name in errors.
        dataset: the dataset.
        tokenizer: needs a chat template if prompts are chat messages.

    Returns:
        The dataset, unchanged.

    Raises:
        TypeError: it is not a ``datasets.Dataset``.
        ValueError: it is empty, or a prompt is missing, empty or of another type.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset, got {type(dataset).__name__}")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'prompt', only {dataset.column_names}; rename the column that holds the prompts"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; it needs at least one row")
    for row, prompt in enumerate(dataset["prompt"]):
        if not prompt or not isinstance(prompt, (str, list)):
            raise ValueError(f"{name} row {row}: prompt must be text or a list of chat messages, got {prompt!r}")
        if isinstance(prompt, list) and not tokenizer.chat_template:
            raise ValueError(
                f"{name} row {row}: prompt is a list of chat messages and processing_class has no chat_template; "
                "set tokenizer.chat_template, or make the prompts text"
            )
    return dataset


def drop_long_prompts(dataset: Dataset, encode: Callable[[Mapping[str, Any]], list[int]], limit: int | None) -> Dataset:
    """Drop the rows whose prompts have more than ``limit`` tokens; None keeps all.

    Args:
        dataset: the rows.
        encode: returns the tokens of a row's prompt.
        limit: see above.

    Raises:
        ValueError: no row is left.
    """
    if limit is None:
        return dataset
    kept = [i for i, row in enumerate(dataset) if len(encode(row)) <= limit]
    if not kept:
        raise ValueError(f"max_prompt_length={limit} leaves no prompt of {len(dataset)}; increase it")
    if len(kept) < len(dataset):
        logger.warning(
            f"dropped {len(dataset) - len(kept)} of {len(dataset)} prompts longer than max_prompt_length={limit} tokens"
        )
    return dataset.select(kept)


def named(dataset: Any) -> dict[str, Any]:
    """Return datasets by name; a single dataset gets the empty name, and None gives no dataset."""
    return dataset if isinstance(dataset, dict) else {} if dataset is None else {"": dataset}
