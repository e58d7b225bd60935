"""Benchmark suites: what the library claims, measured. ``python -m benchmarks`` lists them."""
