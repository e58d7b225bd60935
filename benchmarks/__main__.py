"""Command line of the benchmark suites: ``python -m benchmarks SUITE [options]``.

A suite is a module with a docstring, ``add_arguments(parser)`` and ``run(args) -> exit code``.
"""

from __future__ import annotations

import argparse
import sys

import benchmarks.algorithms
import benchmarks.compile
import benchmarks.endurance
import benchmarks.flops
import benchmarks.gpu
import benchmarks.kernels
import benchmarks.learn
import benchmarks.memory
import benchmarks.report
import benchmarks.sparse
import benchmarks.step
import benchmarks.traffic
import benchmarks.trl_patch
import benchmarks.tune

SUITES = {
    "kernels": benchmarks.kernels,
    "compile": benchmarks.compile,
    "traffic": benchmarks.traffic,
    "flops": benchmarks.flops,
    "memory": benchmarks.memory,
    "sparse": benchmarks.sparse,
    "learn": benchmarks.learn,
    "algorithms": benchmarks.algorithms,
    "step": benchmarks.step,
    "trl": benchmarks.trl_patch,
    "endurance": benchmarks.endurance,
    "tune": benchmarks.tune,
    "gpu": benchmarks.gpu,
    "report": benchmarks.report,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmark suites of sppo_kernels.")
    suites = parser.add_subparsers(title="suites", metavar="SUITE")
    for name, module in SUITES.items():
        description = module.__doc__ or ""
        suite = suites.add_parser(
            name,
            help=description.partition("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(suite)
        suite.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help()
        return 0
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
