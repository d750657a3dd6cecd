"""Plugins: what is installed, what a run asks for, and how their hooks are called."""
