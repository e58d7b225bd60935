"""Tests of loading prompts: every kind of source and option, and errors in them."""

import json
import logging

import datasets
import pytest
from sandbox_cases import in_namespaces

from sppo.data import load_prompts
from sppo.rewards import score

ROWS = [
    {"prompt": "What is 1 + 1?", "answer": "2", "level": 1},
    {"prompt": "what is 1+1", "answer": "2", "level": 1},
    {"prompt": "What is 1 - 1?", "answer": "0", "level": 2},
    {"prompt": "What is 2 + 2?", "answer": "4", "level": 1},
    {"prompt": "What is  2 + 2 ?", "answer": "5", "level": 1},
]


def rows(count=2, seed=None):
    return [{"prompt": f"number {i} of {seed}"} for i in range(count)]


def table():
    return datasets.Dataset.from_list(ROWS)


def number():
    return 3


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def verl_file(tmp_path):
    """Return a file with chat messages, nested ground truth, a misspelt column, and a column added by pandas."""
    row = {
        "data_source": "aime",
        "prompt": [{"role": "user", "content": "Find x."}],
        "abality": "math",
        "reward_model": {"ground_truth": "70", "style": "rule"},
        "extra_info": {"index": 0},
        "solution": "long",
        "__index_level_0__": 0,
    }
    path = tmp_path / "aime.parquet"
    datasets.Dataset.from_list([row] * 3).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv"])
def test_all_file_formats_load(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        getattr(table(), f"to_{kind.removesuffix('l')}")(path)
    data = load_prompts(str(path))
    assert data["prompt"][:] == [row["prompt"] for row in ROWS]
    assert data["level"][:] == [row["level"] for row in ROWS]


def test_the_layout_of_verl_loads_unchanged(verl_file):
    data = load_prompts(verl_file)
    assert data[0]["prompt"] == [{"role": "user", "content": "Find x."}]
    assert data["answer"][:] == ["70"] * 3
    assert data["ability"][:] == ["math"] * 3
    assert data[0]["extra_info"] == {"index": 0}


def test_functions_are_sources():
    assert load_prompts(f"{__file__}:table").num_rows == 5
    assert load_prompts({"name": f"{__file__}:rows", "count": 3, "seed": 7})["prompt"][-1] == "number 2 of 7"
    assert load_prompts(f"{__file__}:rows?count=4").num_rows == 4


def test_options_in_name_mapping_and_keywords_are_equivalent():
    source = f"{__file__}:table"
    expected = load_prompts(source, limit=2, seed=1)[:]
    assert load_prompts(f"{source}?limit=2&seed=1")[:] == expected
    assert load_prompts({"name": source, "limit": 2}, seed=1)[:] == expected
    assert load_prompts(table(), limit=2, seed=1)[:] == expected
    assert load_prompts(source, seed=2)["prompt"][:] != load_prompts(source, seed=1)["prompt"][:]


def test_templates_are_filled(verl_file):
    data = load_prompts(table(), prompt_template=r"Level {level}: {prompt} Use \boxed{}.")
    assert data["prompt"][0] == r"Level 1: What is 1 + 1? Use \boxed{}."
    assert load_prompts(table().rename_column("prompt", "question"), prompt_template="{question}").num_rows == 5
    data = load_prompts(verl_file, prompt_template="{prompt} Be brief.", system_prompt="You add.")
    assert data[0]["prompt"] == [
        {"role": "system", "content": "You add."},
        {"role": "user", "content": "Find x. Be brief."},
    ]
    assert load_prompts(table(), chat=True)[0]["prompt"] == [{"role": "user", "content": "What is 1 + 1?"}]


def test_dropped_prompts_are_counted_in_the_log(caplog):
    caplog.set_level(logging.INFO, logger="sppo.data")
    assert load_prompts(table(), drop_duplicates=True)["answer"][:] == ["2", "0", "4"]
    assert load_prompts(table(), drop_conflicts=True)["answer"][:] == ["2", "2", "0"]
    held_out = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "WHAT IS 1+1"}]}])
    options = {"drop_duplicates": True, "drop_conflicts": True, "exclude": held_out}
    assert load_prompts(table(), prompt_template="Q: {prompt}", **options)["answer"][:] == ["0"]
    message = caplog.messages[-1]
    assert "2 also in the excluded set, 2 with conflicting answers, 0 duplicates; 1 of 5 prompts left" in message
    with pytest.raises(ValueError, match="nothing is left"):
        load_prompts(table(), exclude=[table()])


@in_namespaces
@pytest.mark.parametrize("task", ["chain_sum", "arc_agi", "list_functions", "countdown", "graph_color", "rush_hour"])
def test_reasoning_gym_tasks_use_their_own_verifier(task):
    data = load_prompts(f"reasoning_gym:{task}?size=2&seed=5")
    assert data[:] == load_prompts({"name": "reasoning_gym", "task": task, "size": 2, "seed": 5})[:]
    columns = {name: data[name][:] for name in data.column_names if name != "prompt"}
    answers = data["answer"][:]
    if answers[0] is not None:
        correct = [f"<think>hm</think> I say <answer>{answer}</answer>" for answer in answers]
        assert score(["reasoning_gym"], data["prompt"][:], correct, columns).rewards == [1.0, 1.0]
    wrong = score(["reasoning_gym"], data["prompt"][:], ["<answer>no</answer>", "<think>"], columns)
    assert wrong.failures == []
    assert max(wrong.rewards) < 0.2


def test_reasoning_gym_options_reach_the_task():
    data = load_prompts({"name": "reasoning_gym", "task": "chain_sum", "size": 3, "min_terms": 5, "max_terms": 5})
    assert data.num_rows == 3
    assert all(prompt.count(" + ") + prompt.count(" - ") == 4 for prompt in data["prompt"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"limit": 3}, "names no source"),
        ("", "names no source"),
        ("reasoning_gym:chain_sun", "no task 'chain_sun'; did you mean 'chain_sum'"),
        ("reasoning_gym:chain_sum?sise=3", "no option 'sise'; did you mean 'size'"),
        ("reasoning_gym:chain_sum?min_terms=0", "min_terms must be positive"),
        (f"{__file__}:table?limt=3", "no option 'limt'; did you mean 'limit'"),
        (f"{__file__}:table?limit=0", "limit must be at least 1, got 0"),
        (f"{__file__}:number", "is of type int; give a datasets.Dataset"),
        (f"{__file__}:ROWS", "is a list; name a function"),
        (f"{__file__}:rows?count=0", "is empty"),
        ("no_such_module:f", "cannot import 'no_such_module:f'"),
        (f"{__file__}:table?prompt_template=Solve!", "'Solve!' names no column"),
    ],
)
def test_invalid_sources_raise(source, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


def test_a_missing_file_raises():
    with pytest.raises(FileNotFoundError, match=r"'no/such\.parquet': there is no such file"):
        load_prompts("no/such.parquet")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, r"no column 'prompt', it has \['question'\]; rename one, or .*prompt_template"),
        ({"prompt": "  "}, "the prompt of row 0 is empty"),
        ({"prompt": None}, "the prompt of row 0 is empty"),
        ({"prompt": 5}, "the prompt of row 0 is 5; give text, or chat messages with 'content'"),
        ({"prompt": [{"text": "hi"}]}, "the prompt of row 0 is .*; give text, or chat messages with 'content'"),
    ],
)
def test_invalid_rows_raise(row, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(datasets.Dataset.from_list([row]))


@pytest.mark.parametrize("text", ["", "\n \n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_an_empty_file_raises(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}' is an empty file; give at least one prompt"):
        load_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("value", "is_chat"), [("true", True), ("True", True), ("1", True), ("false", False), ("False", False)]
)
def test_a_switch_may_be_written_as_in_python(value, is_chat, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "2 + 2"}\n')
    assert isinstance(load_prompts(f"{file}?chat={value}")[0]["prompt"], list) is is_chat


def test_a_switch_is_on_or_off():
    with pytest.raises(ValueError, match="chat must be true or false, got 'yes'"):
        load_prompts(table(), chat="yes")
