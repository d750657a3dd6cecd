"""The fixtures of sft's testing kit, as they are."""

from sft.testing import base_model, dataset, metrics, paddle, run_settings, train  # noqa: F401
