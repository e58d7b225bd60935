"""Tables of the docs' reference: the settings of SPPOConfig, and the options of the command line."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path

from benchmarks.harness.results import markdown
from sppo.cli.main import subcommands
from sppo.settings import SPPOSettings

_GROUP_OR_FIELD = re.compile(r"^    (?:# (?P<group>[A-Z][^.\n]*)|(?P<name>\w+): [^\n]+)$", re.M)


def settings_table(_: Path) -> str:
    """Return one table per group of settings, in the order of the source; comments of the source name the groups."""
    known = {field.name: field for field in fields(SPPOSettings)}
    groups: dict[str, list[Field[object]]] = {"General": []}
    for match in _GROUP_OR_FIELD.finditer(inspect.getsource(SPPOSettings)):
        if match["group"]:
            groups[match["group"]] = []
        elif match["name"] in known:
            list(groups.values())[-1].append(known[match["name"]])
    parts = []
    for group, members in groups.items():
        rows = [{"setting": field.name, "default": _default(field), **field.metadata} for field in members]
        columns = {
            "setting": lambda row: f"`{row['setting']}`",
            "default": lambda row: f"`{row['default']}`",
            "meaning": lambda row: _escaped(row["help"]),
        }
        parts.append(f"### {group}\n\n{markdown(rows, columns)}")
    return "\n\n".join(parts)


def _default(field: Field[object]) -> object:
    return field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]


def _escaped(text: str) -> str:
    return text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")


def commands_table(_: Path) -> str:
    """Return one table of options per subcommand of ``sppo``."""
    parts = []
    for name, command in subcommands().items():
        rows = []
        for action in command._actions:  # argparse has no public list of them
            if action.dest == "help":
                continue
            value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
            if action.choices:
                value = f" {{{','.join(action.choices)}}}"
            names = ", ".join(action.option_strings)
            text = (action.help or "") % {"default": action.default}
            rows.append({"option": f"{names}{value}".strip(), "meaning": _escaped(text)})
        columns = {"option": lambda row: f"`{row['option']}`", "meaning": lambda row: row["meaning"]}
        usage = f"\n\n    {command.usage}" if command.usage else ""  # argparse's own differs between Python versions
        parts.append(f"### sppo {name}{usage}\n\n{command.description}\n\n{markdown(rows, columns)}")
    return "\n\n".join(parts)
