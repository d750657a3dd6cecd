"""sft: supervised fine-tuning of large language models on PaddlePaddle, one plugin a technique.

The names below are the whole public API for plugin authors and Python users, beside two modules: ``sft.testing`` for
tests of plugins, and ``sft.parallel`` for parallel strategies. Importing this package imports no paddle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft.conversations import Conversation, ToolCall, Turn
from sft.errors import PluginError, SftDeprecationWarning, SftError, SignalError, TooEarlyError, UsageError
from sft.foreign_text import safe, shown
from sft.options import option
from sft.plugins.api import API_VERSION
from sft.plugins.marks import hookimpl, hookspec, single
from sft.plugins.registry import Plugin
from sft.plugins.trial import Trial
from sft.seams import (
    AdapterFiles,
    AdapterLayer,
    AdapterMerger,
    AttentionBackend,
    Batch,
    DataCollator,
    Example,
    Learning,
    Losses,
    Objective,
    ParallelStrategy,
    ParameterGroup,
    QuantizedLayer,
    Quantizer,
    Targets,
    TokenLoss,
)

if TYPE_CHECKING:
    from sft.arrays import array_of, copy_onto
    from sft.commands.completing import SettingsCommand
    from sft.commands.typed import collect
    from sft.context import Run, Summary
    from sft.control import Control
    from sft.data.batches import assemble
    from sft.data.formats import turns_of
    from sft.distributed.parts import sum_over
    from sft.dry_runs import DryRun, dry_run
    from sft.files import read_report
    from sft.fine_tune import run
    from sft.folder_lock import Holder, holder_of
    from sft.hub_names import is_hub_name
    from sft.models.adapter_folder import read_adapter
    from sft.models.architecture import Architecture, Block, Experts, ModelShape, Norms
    from sft.models.attention import DefaultAttention
    from sft.models.beside import Beside, HeadLayer
    from sft.models.experts import through_experts
    from sft.models.families.family import Family, LanguageModel, Reading
    from sft.models.families.values import Values
    from sft.models.fingerprint import fingerprint
    from sft.models.finished import FinishedModel
    from sft.models.kept_keys import KeptKeys, Seen
    from sft.models.kernels import PLAIN, Kernels, Linear
    from sft.models.layers import (
        Target,
        linear_bias,
        linear_weight,
        matching,
        module_names,
        target_layers,
        vocabulary_layers,
    )
    from sft.models.loading import open_model
    from sft.models.own_kernels import own_kernels
    from sft.models.recompute import recomputed
    from sft.models.reference import Reference
    from sft.models.rotary import Rotary
    from sft.models.shards import parse_size
    from sft.models.sums import row_sums
    from sft.optimizer import Optimizer
    from sft.pages import check_place as check_html
    from sft.pages import document as html_page
    from sft.pages import text as html_text
    from sft.patterns import matches
    from sft.precision import Precision
    from sft.reopening import PastStep, Reopened, reopened
    from sft.run_report.gather import read_run
    from sft.run_report.library import chart_library
    from sft.run_report.value import RunReport
    from sft.runtime import prepare
    from sft.settings.arguments import Settings
    from sft.settings.paddlenlp import Foreign
    from sft.training.adamw import AdamW
    from sft.training.resume_checks import check_continued

__version__ = "0.1.0"

# Loaded on first use: they stay out of `sft --help`. After a colon, what a name is called in its module.
_LAZY = {
    "AdamW": "sft.training.adamw",
    "Optimizer": "sft.optimizer",
    "Architecture": "sft.models.architecture",
    "Beside": "sft.models.beside",
    "Block": "sft.models.architecture",
    "Control": "sft.control",
    "DefaultAttention": "sft.models.attention",
    "Experts": "sft.models.architecture",
    "Foreign": "sft.settings.paddlenlp",
    "Family": "sft.models.families.family",
    "FinishedModel": "sft.models.finished",
    "HeadLayer": "sft.models.beside",
    "Holder": "sft.folder_lock",
    "KeptKeys": "sft.models.kept_keys",
    "Kernels": "sft.models.kernels",
    "LanguageModel": "sft.models.families.family",
    "Linear": "sft.models.kernels",
    "ModelShape": "sft.models.architecture",
    "Norms": "sft.models.architecture",
    "PLAIN": "sft.models.kernels",
    "Reading": "sft.models.families.family",
    "Reference": "sft.models.reference",
    "Rotary": "sft.models.rotary",
    "Seen": "sft.models.kept_keys",
    "Values": "sft.models.families.values",
    "DryRun": "sft.dry_runs",
    "Settings": "sft.settings.arguments",
    "SettingsCommand": "sft.commands.completing",
    "RunReport": "sft.run_report.value",
    "array_of": "sft.arrays",
    "chart_library": "sft.run_report.library",
    "copy_onto": "sft.arrays",
    "fingerprint": "sft.models.fingerprint",
    "is_hub_name": "sft.hub_names",
    "open_model": "sft.models.loading",
    "PastStep": "sft.reopening",
    "Precision": "sft.precision",
    "Reopened": "sft.reopening",
    "Run": "sft.context",
    "Summary": "sft.context",
    "assemble": "sft.data.batches",
    "best_metric": "sft.settings.best_metric",
    "check_continued": "sft.training.resume_checks",
    "check_html": "sft.pages:check_place",
    "html_page": "sft.pages:document",
    "html_text": "sft.pages:text",
    "module_names": "sft.models.layers",
    "prepare": "sft.runtime",
    "own_kernels": "sft.models.own_kernels",
    "recomputed": "sft.models.recompute",
    "reopened": "sft.reopening",
    "read_report": "sft.files",
    "read_run": "sft.run_report.gather",
    "read_adapter": "sft.models.adapter_folder",
    "run": "sft.fine_tune",
    "Target": "sft.models.layers",
    "collect": "sft.commands.typed",
    "dry_run": "sft.dry_runs",
    "holder_of": "sft.folder_lock",
    "matches": "sft.patterns",
    "matching": "sft.models.layers",
    "parse_size": "sft.models.shards",
    "row_sums": "sft.models.sums",
    "linear_bias": "sft.models.layers",
    "linear_weight": "sft.models.layers",
    "sum_over": "sft.distributed.parts",
    "target_layers": "sft.models.layers",
    "through_experts": "sft.models.experts",
    "turns_of": "sft.data.formats",
    "vocabulary_layers": "sft.models.layers",
}

__all__ = [
    "API_VERSION",
    "PLAIN",
    "AdamW",
    "AdapterFiles",
    "AdapterLayer",
    "AdapterMerger",
    "Architecture",
    "AttentionBackend",
    "Batch",
    "Beside",
    "Block",
    "Control",
    "Conversation",
    "DataCollator",
    "DefaultAttention",
    "DryRun",
    "Example",
    "Experts",
    "Family",
    "FinishedModel",
    "Foreign",
    "HeadLayer",
    "Holder",
    "KeptKeys",
    "Kernels",
    "LanguageModel",
    "Learning",
    "Linear",
    "Losses",
    "ModelShape",
    "Norms",
    "Objective",
    "Optimizer",
    "ParallelStrategy",
    "ParameterGroup",
    "PastStep",
    "Plugin",
    "PluginError",
    "Precision",
    "QuantizedLayer",
    "Quantizer",
    "Reading",
    "Reference",
    "Reopened",
    "Rotary",
    "Run",
    "RunReport",
    "Seen",
    "Settings",
    "SettingsCommand",
    "SftDeprecationWarning",
    "SftError",
    "SignalError",
    "Summary",
    "Target",
    "Targets",
    "TokenLoss",
    "TooEarlyError",
    "ToolCall",
    "Trial",
    "Turn",
    "UsageError",
    "Values",
    "array_of",
    "assemble",
    "best_metric",
    "chart_library",
    "check_continued",
    "check_html",
    "collect",
    "copy_onto",
    "dry_run",
    "fingerprint",
    "holder_of",
    "hookimpl",
    "hookspec",
    "html_page",
    "html_text",
    "is_hub_name",
    "linear_bias",
    "linear_weight",
    "matches",
    "matching",
    "module_names",
    "open_model",
    "option",
    "own_kernels",
    "parse_size",
    "prepare",
    "read_adapter",
    "read_report",
    "read_run",
    "recomputed",
    "reopened",
    "row_sums",
    "run",
    "safe",
    "shown",
    "single",
    "sum_over",
    "target_layers",
    "through_experts",
    "turns_of",
    "vocabulary_layers",
]


def __dir__() -> list[str]:
    """What help() lists: the names that are loaded on first use too."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        module, _, own = _LAZY[name].partition(":")
        return getattr(importlib.import_module(module), own or name)
    raise AttributeError(f"module 'sft' has no attribute {name!r}")
