"""Packing as sft plugins: several records share a row and do not see each other."""
