"""Measurements beside other programs: ``python -m benchmarks`` runs them, docs/performance.md shows what came out."""
