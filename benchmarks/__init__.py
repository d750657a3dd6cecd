"""Measurements beside other programs: ``python -m benchmarks`` runs them, docs/performance.md shows what came out.

``profiling.py`` and ``parallel_gpu.py`` are programs of their own.
"""
