"""Benchmarks and studies of LAVITA, run as `python -m benchmarks`; they are not part of the installed package."""
