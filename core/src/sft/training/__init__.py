"""Training: the loop and its parts. Start reading at ``loop.py``."""
