"""The papers' claims as experiments on the generated benchmark, run by ``python -m benchmarks.evidence``."""
