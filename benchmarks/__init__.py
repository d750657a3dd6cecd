"""Measurements beside other programs: ``python -m benchmarks`` runs them, docs/performance.md shows what came out.

``profiling.py``, ``parallel_gpu.py`` and ``parallel_checks.py`` are programs of their own.
"""
