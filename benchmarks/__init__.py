"""Benchmarks of kdfast: ``python -m benchmarks --help``. Nothing is timed before it was found to be right."""
