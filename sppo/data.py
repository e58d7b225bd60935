"""Prompts to train and evaluate on: a file, a reasoning-gym task, a function or a dataset of the hub, in one layout.

The result has a column ``prompt`` (text, or chat messages with ``role`` and ``content``) and those that rewards read.
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

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from sppo._utils import import_object, nearest
from sppo.rewards.builtin import pack, reasoning_gym_task
from sppo.rewards.scoring import split_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}

logger = logging.getLogger(__name__)


def load_prompts(source: str | Mapping[str, Any] | Dataset, **options: Any) -> Dataset:
    """Load prompts and bring them into the layout that the trainer and the rewards read.

    ``reward_model["ground_truth"]`` also becomes the column ``answer`` where there is none. Two prompts count as the
    same if they differ in case, white space and punctuation alone. What is dropped is logged with its count.

    Args:
        source: a ``.parquet``, ``.json``, ``.jsonl`` or ``.csv`` file; ``reasoning_gym:TASK``; ``module:function`` that
            returns a Dataset or a list of rows; a name on the hub; or a Dataset. Options may stand in it, as in
            ``data.parquet?limit=100``, or in a mapping with the source under ``name`` (``reasoning_gym`` may have its
            task under ``task``).
        **options: these, and others for the reasoning-gym task, the function or ``datasets.load_dataset``:

            - ``split``: which part of a dataset of the hub; default ``"train"``.
            - ``limit``: keep the first so many, after shuffling and dropping.
            - ``seed``: shuffle. For a reasoning-gym task, or a function with that argument, it makes the rows instead.
            - ``prompt_template``: text in which ``{column}`` stands for the row's value, ``{prompt}`` for its message.
            - ``system_prompt``: the system message; makes text prompts chat messages.
            - ``chat``: make text prompts chat messages.
            - ``drop_duplicates``: keep the first of the same prompts.
            - ``drop_conflicts``: keep none of the same prompts whose answers differ.
            - ``exclude``: a source (the evaluation set) or a list of them; drop the prompts that they hold too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown source or option, no column ``prompt``, an empty prompt, or no prompt at all.
    """
    given: dict[str, Any] = {}
    if isinstance(source, Mapping):
        given = dict(source)
        source = given.pop("name", "")
        if source == "reasoning_gym":
            source = f"reasoning_gym:{given.pop('task', '')}"
    if isinstance(source, str):
        source, query = split_options(source)
        given = {**query, **given}
    if not isinstance(source, Dataset) and not source:
        raise ValueError(
            f"dataset {given!r} names no source; give a file, reasoning_gym:TASK, module:function or hub name"
        )
    options = {**given, **options}
    arrange = {key: options.pop(key) for key in _ARRANGE_OPTIONS & options.keys() if key != "seed"}
    return _arrange(*_read(source, options), describe=str(source)[:80], **arrange)


def _read(source: str | Dataset, options: dict[str, Any]) -> tuple[Dataset, int | None]:
    """The raw table, and the seed to shuffle it with."""
    if isinstance(source, str) and source.startswith("reasoning_gym:"):
        return _reasoning_gym(source.partition(":")[2], options), None
    if isinstance(source, str) and ":" in source:
        make = import_object(source)
        if not callable(make):
            raise ValueError(f"dataset {source!r} is a {type(make).__name__}; name a function that returns the rows")
        seed = None if "seed" in inspect.signature(make).parameters else options.pop("seed", None)
        _check_options(source, options, inspect.signature(make).parameters)
        rows = make(**options)
        return Dataset.from_list(rows) if isinstance(rows, list) else rows, seed
    seed = options.pop("seed", None)
    if isinstance(source, Dataset):
        _check_options("the Dataset", options, ())
        return source, seed
    path = Path(source)
    if path.suffix in FILE_KINDS:
        _check_options(source, options, ())
        if not path.is_file():
            raise FileNotFoundError(f"dataset {source!r}: there is no such file (looked in {path.absolute().parent})")
        return _read_file(path), seed
    try:
        return load_dataset(source, **{"split": "train", **options}), seed
    except Exception as error:  # the hub's client raises errors of many libraries
        kinds = ", ".join(FILE_KINDS)
        raise ValueError(
            f"dataset {source!r} is neither a file ({kinds}), nor reasoning_gym:TASK, nor module:function, and the hub "
            f"did not give it: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _read_file(path: Path) -> Dataset:
    try:
        return load_dataset(FILE_KINDS[path.suffix], data_files=str(path), split="train")
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"dataset {str(path)!r} is no {path.suffix} file: {str(cause).splitlines()[0]}; mend or drop that row"
        ) from error


def _reasoning_gym(task: str, options: dict[str, Any]) -> Dataset:
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(f"reasoning_gym has no task {task!r}{nearest(task, DATASETS)}; it has {len(DATASETS)} tasks")
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


def _arrange(
    data: Dataset,
    seed: int | None,
    *,
    describe: str,
    limit: int | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
    chat: bool = False,
    **drop: Any,
) -> Dataset:
    if limit is not None and limit < 1:
        raise ValueError(f"dataset {describe!r}: limit must be at least 1, got {limit}")
    if isinstance(data, DatasetDict) or not isinstance(data, Dataset):
        raise ValueError(f"dataset {describe!r} gave a {type(data).__name__}; give a Dataset (choose a split)")
    if len(data) == 0:
        raise ValueError(f"dataset {describe!r} is empty; give at least one prompt")
    if "prompt" not in data.column_names and prompt_template is None:
        raise ValueError(
            f"dataset {describe!r} has no column 'prompt', it has {data.column_names}; rename one, or make prompts "
            "from its columns with prompt_template, for example '{question}'"
        )
    if "answer" not in data.column_names and "reward_model" in data.column_names:
        data = _with_column(data, "answer", [row["ground_truth"] for row in data["reward_model"]])
    if "abality" in data.column_names and "ability" not in data.column_names:  # a spelling that public files have
        data = data.rename_column("abality", "ability")

    prompts = list(data["prompt"]) if prompt_template is None else _fill(prompt_template, data, describe)
    for i, prompt in enumerate(prompts):
        if not text_of(prompt).strip():
            raise ValueError(f"dataset {describe!r}: the prompt of row {i} is empty ({prompt!r}); drop that row")
    if chat or system_prompt is not None:
        prompts = [_as_chat(prompt, system_prompt) for prompt in prompts]
    # Whether prompts are the same shows before the template is put around them.
    keep = _keep(data["prompt"] if "prompt" in data.column_names else prompts, data, describe, **drop)
    data = _with_column(data, "prompt", prompts)
    if keep is not None:
        data = data.select(keep)
    if seed is not None:
        data = data.shuffle(seed=seed)
    return data if limit is None else data.select(range(min(limit, len(data))))


def _keep(
    prompts: Iterable[Any],
    data: Dataset,
    describe: str,
    *,
    drop_duplicates: bool = False,
    drop_conflicts: bool = False,
    exclude: Any = None,
) -> list[int] | None:
    """The rows that the options leave, None for all."""
    if not drop_duplicates and not drop_conflicts and exclude is None:
        return None
    keys = [_key(prompt) for prompt in prompts]
    keep = list(range(len(data)))
    counts = {}
    if exclude is not None:
        sources = exclude if isinstance(exclude, list | tuple) else [exclude]
        held_out = {_key(prompt) for other in sources for prompt in load_prompts(other)["prompt"]}
        keep, counts["also in the excluded set"] = _split(keep, lambda i: keys[i] not in held_out)
    if drop_conflicts and "answer" in data.column_names:
        answers = defaultdict(set)
        for i, answer in enumerate(data["answer"]):
            answers[keys[i]].add(answer)
        keep, counts["of conflicting answers"] = _split(keep, lambda i: len(answers[keys[i]]) == 1)
    if drop_duplicates:
        first = {keys[i]: i for i in reversed(keep)}
        keep, counts["duplicates"] = _split(keep, lambda i: first[keys[i]] == i)
    said = ", ".join(f"{count} {why}" for why, count in counts.items())
    logger.info("%s: dropped %s; %d of %d prompts left", describe, said, len(keep), len(data))
    if not keep:
        raise ValueError(f"dataset {describe!r}: nothing is left after dropping {said}")
    return keep


def _split(rows: list[int], wanted: Callable[[int], bool]) -> tuple[list[int], int]:
    kept = [i for i in rows if wanted(i)]
    return kept, len(rows) - len(kept)


def text_of(prompt: Any) -> str:
    """The prompt's own words: the text, or the last message's."""
    return prompt if isinstance(prompt, str) else (prompt[-1]["content"] or "") if prompt else ""


def _key(prompt: Any) -> str:
    return re.sub(r"[^\w+\-*/<>=^]", "", text_of(prompt).casefold())


def _fill(template: str, data: Dataset, describe: str) -> list[Any]:
    names = set(re.findall(r"\{(\w+)\}", template)) & set(data.column_names)
    if not names:
        raise ValueError(f"prompt_template {template!r} names no column of {describe!r}, which has {data.column_names}")
    prompts = []
    for row in data.select_columns(sorted(names)):
        values = {name: text_of(value) if name == "prompt" else str(value) for name, value in row.items()}
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
    new = f"new {name}"  # added before the old one goes: a table without columns has no length
    return data.add_column(new, values).remove_columns(name).rename_column(new, name)


def _check_options(source: str, options: dict[str, Any], allowed: Iterable[str]) -> None:
    known = {*allowed, *_ARRANGE_OPTIONS}
    for name in options.keys() - known:
        raise ValueError(f"{source} has no option {name!r}{nearest(name, known)}; known: {', '.join(sorted(known))}")


_ARRANGE_OPTIONS = {
    "limit",
    "seed",
    "prompt_template",
    "system_prompt",
    "chat",
    "drop_duplicates",
    "drop_conflicts",
    "exclude",
}


def check_dataset(name: str, dataset: Any, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The dataset, which must have rows and a column ``prompt`` of text or chat messages; ``name`` is for the error."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset, got {type(dataset).__name__}")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'prompt', only {dataset.column_names}; rename the one with the questions"
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


def drop_long_prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Dataset:
    """The rows whose prompts have at most ``limit`` tokens."""
    from sppo.rollout import encode

    if limit is None:
        return dataset
    kept = [i for i, prompt in enumerate(dataset["prompt"]) if len(encode(prompt, tokenizer)) <= limit]
    if not kept:
        raise ValueError(f"max_prompt_length={limit} leaves no prompt of {len(dataset)}; raise it")
    if len(kept) < len(dataset):
        logger.warning(
            f"{len(dataset) - len(kept)} of {len(dataset)} prompts are longer than max_prompt_length={limit}"
        )
    return dataset.select(kept)


def named(dataset: Any) -> dict[str, Any]:
    """Datasets by name; one alone has the empty name."""
    return dataset if isinstance(dataset, dict) else {} if dataset is None else {"": dataset}
