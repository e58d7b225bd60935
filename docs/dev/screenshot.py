"""Take the picture of the console in docs/guides/monitoring.md: ``python docs/dev/screenshot.py``.

It runs the command that the picture shows, in a terminal of its own (tmux); the picture is the screen at one moment. It
takes about a minute on two CPU cores. Requires tmux and rich.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

COMMAND = "sppo train quickstart --max_steps 40 --logging_steps 1 --eval_steps 10 --log_completions false"
PICTURE = Path(__file__).parents[1] / "images/console.svg"
COLUMNS, ROWS = 100, 36
TIMEOUT = 600.0


def main() -> None:
    """Run the command until an update, and write the screen as SVG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", type=int, default=32, help="update at which the picture is taken (%(default)s)")
    parser.add_argument("--output", type=Path, default=PICTURE, help="SVG file (%(default)s)")
    options = parser.parse_args()
    screen = screen_at(f"update {options.update}/")
    recorder = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in screen.splitlines():
        recorder.print(Text.from_ansi(line), no_wrap=True, crop=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    without_fonts = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # from other sites
    recorder.save_svg(str(options.output), title=COMMAND, code_format=without_fonts)
    print(f"{options.output}, {options.output.stat().st_size / 1e3:.0f} kB")


def screen_at(text: str) -> str:
    """Run the command in a terminal and return its screen, with colors, as soon as that shows a text."""
    python = f"{shlex.quote(sys.executable)} -m sppo.cli {COMMAND.removeprefix('sppo ')}"
    root = shlex.quote(str(Path(__file__).parents[2]))
    server = f"sppo-screenshot-{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder:
        environment = f"COLORTERM=truecolor PYTHONPATH={root}"
        tmux(server, "new-session", "-d", "-x", COLUMNS, "-y", ROWS, "-c", folder, f"{environment} {python}; sleep 60")
        try:
            for _ in range(int(TIMEOUT / 0.1)):
                screen = tmux(server, "capture-pane", "-e", "-p")
                if text in screen:
                    return screen
                time.sleep(0.1)
        finally:
            tmux(server, "kill-server")
    raise TimeoutError(f"the screen did not show {text!r} within {TIMEOUT:.0f} s:\n{screen}")


def tmux(server: str, *arguments: object) -> str:
    """Run tmux with a server of its own and no configuration."""
    command = ["tmux", "-L", server, "-f", "/dev/null", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
