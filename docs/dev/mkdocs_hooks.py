"""Hooks of mkdocs.yml, so that pages are plain Markdown that also reads well in the repository.

- A link to a file outside of docs/ gets a copy of that file below repository/ on the site.
- ``<!-- api: NAME -->`` becomes the docstrings of NAME.
- Formulas become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import html
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
COPIES = "repository"
_LINK = re.compile(r"(\[!\[[^\]]*\]\([^)]*\)\]|!?\[[^\]]*\])\(([^)\s#]+)(#[^)\s]*)?\)")
_API = re.compile(r"^<!-- api: (\S+) -->$", re.M)
_FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def _source(uri: str) -> PurePosixPath:
    """Return where in the repository a page is."""
    path = PurePosixPath(uri)
    return path.relative_to(COPIES) if path.parts[0] == COPIES else PurePosixPath("docs") / path


def _target(source: PurePosixPath) -> str:
    """Return where on the site a file of the repository is."""
    return str(source.relative_to("docs")) if source.parts[0] == "docs" else f"{COPIES}/{source}"


def _linked(source: PurePosixPath) -> set[PurePosixPath]:
    """Return the files of the repository that a page links to."""
    found = set()
    for _, link, _ in _LINK.findall((ROOT / source).read_text(encoding="utf-8")):
        if ":" not in link:
            path = PurePosixPath(normpath(str(source.parent / link)))
            if path.parts[0] != ".." and (ROOT / path).is_file():
                found.add(path)
    return found


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside of docs/ that pages link to, and those that these link to."""
    pending = [_source(file.src_uri) for file in files.documentation_pages()]
    pending += [PurePosixPath(name) for name in ("CONTRIBUTING.md", "CHANGELOG.md", "README.md")]
    seen: set[PurePosixPath] = set()
    while pending:
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        if source.parts[0] != "docs":
            files.append(File.generated(config, _target(source), abs_src_path=str(ROOT / source)))
        if source.suffix == ".md":
            pending += _linked(source)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the site's copies of files, and insert the docstrings."""
    source = _source(page.file.src_uri)
    here = str(PurePosixPath(page.file.src_uri).parent)

    def link(match: re.Match[str]) -> str:
        label, path, anchor = match.groups(default="")
        target = PurePosixPath(normpath(str(source.parent / path)))
        if ":" in path or target.parts[0] == "..":
            return match[0]
        if (ROOT / target).is_dir():
            return label[1:-1]  # the site has no page for a folder
        return f"{label}({relpath(_target(target), here)}{anchor})"

    parts = _FENCE.split(markdown)
    parts[::2] = [_API.sub(r"::: \1", _LINK.sub(link, part)) for part in parts[::2]]
    return "".join(parts)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Replace formulas by MathML."""

    def mathml(match: re.Match[str]) -> str:
        tag, bracket, formula = match.groups()
        math = convert(html.unescape(formula).strip(), display="block" if bracket == "[" else "inline")
        math = math.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')  # the bars of a norm
        return f'<{tag} class="arithmatex">{math}</{tag}>'

    return _MATH.sub(mathml, content)
