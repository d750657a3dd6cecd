"""Trackers as sft plugins."""
