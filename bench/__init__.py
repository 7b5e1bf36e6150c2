"""Benchmarks: each fast path beside the peer it must beat, timed in turn in one run. `python -m bench` runs all."""
