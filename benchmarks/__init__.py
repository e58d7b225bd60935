"""Benchmark suites that measure what the library claims. ``python -m benchmarks`` lists them.

Each module or folder of this package is a suite with the name of its command; ``harness`` holds what they share.
"""
