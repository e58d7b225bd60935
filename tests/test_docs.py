"""The Python of README, CONTRIBUTING and docs runs as it stands, but for the model's path. Links and paths exist."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import vllm_stand_in
from tiny_models import char_tokenizer, tiny_model

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "SECURITY.md",
    ROOT / "examples/README.md",
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def examples(page):
    """Return the Python of each block. In CONTRIBUTING.md the blocks of a section are one file."""
    parts = page.read_text().split("\n## ")
    if page.name == "CONTRIBUTING.md":
        return ["\n".join(blocks) for part in parts if (blocks := BLOCK.findall(part))]
    return [block for part in parts for block in BLOCK.findall(part)]


EXAMPLES = [pytest.param(code, id=f"{page.name}-{i}") for page in PAGES for i, code in enumerate(examples(page))]


def run(code, tmp_path, monkeypatch):
    """Run an example in ``tmp_path``, with a tiny model at path/to/model and a stand-in for vLLM -> its names."""
    monkeypatch.chdir(tmp_path)
    if "from vllm import" in code:
        monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in.module())
    if "path/to/model" in code:
        tiny_model("llama").save_pretrained("path/to/model")
        char_tokenizer().save_pretrained("path/to/model")
        code = code.replace("max_steps=100", "max_steps=1, max_completion_length=4, use_cpu=True, report_to=[]")
    Path("example.py").write_text(code)  # a file, because Triton reads the source of a kernel
    return runpy.run_path("example.py", run_name="example")


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, tmp_path, monkeypatch):
    run(code, tmp_path, monkeypatch)


def test_the_sampling_example_scores_what_the_engine_sampled(tmp_path, monkeypatch):
    """Packed and padded log-probabilities are those of the engine, of policy and reference alike."""
    (code,) = [code for code in examples(ROOT / "docs/guides/own-loop.md") if "from vllm import" in code]
    torch.manual_seed(0)  # with other seeds the responses may be of equal length, without padding
    names = run(code, tmp_path, monkeypatch)
    logprobs = [
        torch.tensor([entry[token].logprob for token, entry in zip(sample.token_ids, sample.logprobs, strict=True)])
        for sample in names["samples"]
    ]
    torch.testing.assert_close(names["old"], torch.cat(logprobs), rtol=1e-4, atol=1e-5)
    assert torch.equal(names["old"], names["ref"])
    padded = torch.nn.utils.rnn.pad_sequence(logprobs, batch_first=True)
    torch.testing.assert_close(names["logprobs"].detach(), padded, rtol=1e-4, atol=1e-5)
    assert names["labels"].eq(-100).any()
    sizes = names["settings"]["support"][1].diff()
    assert 1 < sizes.max() < names["policy"].config.vocab_size


def anchors(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue  # another site
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    folders = "benchmarks|docs|examples|hub_kernel|sppo|sppo_kernels|tests"
    paths = re.findall(rf"`((?:{folders})/[a-z0-9_./-]*)`", page.read_text())  # NAME is the reader's
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_named_tests_exist():
    """Pages name tests as `tests/PATH.py`: `test_a`, `test_b`."""
    named = 0
    for page in PAGES:
        for files, tests in re.findall(r"((?:`tests/[\w/]+\.py`[, and]*)+): ((?:`test_\w+`[, ]*)+)", page.read_text()):
            sources = [(ROOT / file).read_text() for file in re.findall(r"`(.+?)`", files)]
            for test in re.findall(r"`(.+?)`", tests):
                named += 1
                assert all(f"def {test}(" in source for source in sources), (page.name, files, test)
    assert named > 20


def test_readme_is_short():
    """150 lines, and sentences of at most 20 words on average."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    prose = re.sub(r"```.*?```|^(?:\||    |#|!|\[!).*?$", "", text, flags=re.S | re.M)
    sentences = [sentence for sentence in re.split(r"[.:](?:\s|$)|\n\n", prose) if len(sentence.split()) > 2]
    assert sum(len(sentence.split()) for sentence in sentences) / len(sentences) <= 20


def test_pages_named_in_the_code_exist():
    files = [
        path for folder in ("sppo", "sppo_kernels", "benchmarks", "examples") for path in (ROOT / folder).rglob("*")
    ]
    texts = [path.read_text() for path in files if path.suffix in (".py", ".yaml", ".sh")]
    pages = {page for text in texts for page in re.findall(r"\bdocs/[\w/-]+\.md\b", text)}
    assert [page for page in sorted(pages) if not (ROOT / page).exists()] == []
