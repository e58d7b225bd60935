"""Command line of the benchmark suites: ``python -m benchmarks SUITE [options]``.

Only the chosen suite is imported, so that each requires its own packages only.
"""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks.harness import suite


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()  # before torch is imported, which takes seconds
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmark suites of sppo_kernels.")
    parser.add_argument("--list", action="store_true", help="print only the names of the suites, one per line")
    commands = parser.add_subparsers(title="suites", metavar="SUITE")
    for name in suite.names():
        command = commands.add_parser(
            name,
            help=suite.summary(name),
            description=suite.docstring(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if given[:1] == [name]:
            chosen = suite.load(name)
            chosen.add_arguments(command)
            command.set_defaults(run=chosen.run, started=started, argv=given)
    args = parser.parse_args(given)
    if args.list:
        print("\n".join(suite.names()))
        return 0
    if "run" not in args:
        parser.print_help()
        return 0
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
