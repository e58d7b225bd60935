"""The Python in README and docs runs as it stands; only the model's path is filled in."""

import re
from pathlib import Path

import pytest
from tiny_models import char_tokenizer, tiny_model

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{i}")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "path/to/model" in code:
        tiny_model("llama").save_pretrained("path/to/model")
        char_tokenizer().save_pretrained("path/to/model")
        code = code.replace("max_steps=100", "max_steps=1, max_completion_length=4, use_cpu=True, report_to=[]")
    exec(compile(code, "<docs>", "exec"), {"__name__": "docs"})
