"""Restart of a command in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys


def run_interpreted(args: argparse.Namespace) -> int:
    """Run the command of ``args`` again in a process with TRITON_INTERPRET=1 and return its exit code."""
    command = [sys.executable, "-m", "benchmarks", *map(str, args.argv)]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
