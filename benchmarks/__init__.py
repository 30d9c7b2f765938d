"""Benchmarks: ratios from one run, medians of several, with machine and versions beside them."""
