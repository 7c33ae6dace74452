"""Benchmarks: `make bench` shows tables, `python -m benchmarks.rows` writes rows to benchmarks/results."""
