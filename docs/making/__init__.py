"""What `docs/generate.py` writes: pages, and parts of pages that are otherwise written by hand."""
