"""Every hook, in the order in which a run calls them. Reading this page explains the framework.

``@hookspec``: all active plugins may answer, and are called in ascending ``order``. ``@single``: at most one
active plugin may implement it; two are refused before anything heavy happens, naming both. A hook that
refuses something raises :class:`sft.UsageError` with the cause and the cure in one sentence.

Objects that cross a hook are described in ``seams.py``. ``run`` is :class:`sft.Run`. Its members come one after the
other: where a hook below says that ``run`` has a member from here on, that hook and all later ones find it; reading it
earlier raises :class:`sft.TooEarlyError`, which names the hook.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.context import Run, Summary
from sft.plugins.registry import hookspec, single

if TYPE_CHECKING:
    import click

    from sft.models.architecture import ModelShape
    from sft.models.families.family import Family
    from sft.seams import (
        AdapterFiles,
        AdapterMerger,
        AttentionBackend,
        Batch,
        DataCollator,
        ParallelStrategy,
        ParameterGroup,
        Quantizer,
        Turn,
    )

# --- the command line ---------------------------------------------------------------------------------------


@hookspec
def sft_commands(cli: click.Group) -> None:
    """Add click commands to ``cli``. Called when a command that the plugin's metadata names is typed."""


# --- settings resolved, nothing heavy done ------------------------------------------------------------------


@hookspec
def sft_check(run: Run) -> None:
    """Refuse settings that do not go together. Neither data nor weights have been touched; keep it instant.

    From here on ``run`` has ``settings``, ``given``, ``plugins``, ``hook``, ``progress``, ``say``, ``output_dir`` and
    ``rng``.
    """


@single
def sft_launch(run: Run) -> Summary | None:
    """Do the run elsewhere, as in processes that are started for it with the settings ``run.given``, and return what
    came of it. Without one, or None: it is done here.

    The process that starts others calls no hook after this one but :func:`sft_run_failed`. A signal that ends it may be
    raised as :class:`SystemExit`."""


# --- the model's config -------------------------------------------------------------------------------------


@hookspec
def sft_model_family(config: dict[str, Any]) -> Family | None:
    """How a model with this ``config.json`` is read, or None where it is not this plugin's.

    Asked of all plugins wherever a model is opened; two that have an answer, or one for a family of sft's own, are
    refused with their names. An :class:`sft.Family` has a reader that makes an :class:`sft.Architecture`, which the
    decoder computes, or builds a class of its own that keeps :class:`sft.LanguageModel` (docs/plugins.md).
    An adapter's file names the plugin that read its base, and brings it back.
    """


@hookspec
def sft_model_config(run: Run | None, config: dict[str, Any]) -> None:
    """Change what the model's ``config.json`` says, in place: JSON values by Hugging Face's names.

    The rotary embedding stands in ``rope_theta``, ``rope_scaling`` (null, or an object with ``rope_type``) and
    ``partial_rotary_factor``, whatever the file calls them; only where it tells layer types apart it is as it was.
    What is changed is computed, or refused as in a file.

    Called wherever a model is opened, before its data is read, with ``run`` None outside a run: all that counts then
    are the plugin's options. An adapter's file names the plugins that changed its base's config, with their options,
    and brings them back; a whole model's ``config.json`` says what was changed.

    From here on ``run`` has ``source``.
    """


# --- data ---------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def sft_record_format(record: dict[str, Any]) -> list[Turn] | None:
    """The turns of one record of a data file, or None if it is not in this plugin's format.

    Asked before the core's own formats. A record without a turn that ``trains`` is refused in training and
    evaluation; for ``sft generate`` one may end with a user's turn instead. Raise ``ValueError`` with the reason for a
    record that is in the format but wrong: the core adds file and line.
    """


@single
def sft_collator(run: Run) -> DataCollator:
    """Which records share a row, and how rows become batches. Without one: a record a row, padded on the right.

    From here on ``run`` has ``resumes``, ``tokenizer``, ``precision`` and ``step``.
    """


# --- the model ----------------------------------------------------------------------------------------------


@single
def sft_parallel_strategy(run: Run) -> ParallelStrategy:
    """How several processes share the run, from reading the weights on. Without one: a single process."""


@single
def sft_quantizer(run: Run | None) -> Quantizer:
    """What stands for Linear layers of the transformer blocks while weights stream in.

    ``run`` is None where a model is loaded outside a run, for answers, ``sft evaluate`` or ``sft merge``: all that
    counts then are the plugin's options. Without a quantizer: Linear layers in the dtype of ``run.precision.weights``
    (float32, or that of bf16 and fp16 under O2), and in float32 outside a run.

    From here on ``run`` has ``strategy``.
    """


@single
def sft_attention_backend(run: Run, config: ModelShape) -> AttentionBackend:
    """How attention is computed in training and evaluation. Without one: paddle's scaled_dot_product_attention.

    ``config`` is what the model is: an :class:`sft.Architecture` where sft's own decoder computes it. A backend says
    what it can beside plain attention (see :class:`sft.AttentionBackend`); a model that needs more is refused.
    """


@hookspec
def sft_adapt_model(run: Run, model: Any) -> None:
    """The adapter seam: weights are in place; replace or wrap layers, and set what trains (``stop_gradient``).

    The layers to adapt come from :func:`sft.target_layers`, a layer's whole weight from ``run.strategy.linear_weight``.
    A layer that is put in place is a :class:`sft.AdapterLayer`, whose ``sides`` say how processes divide it. When
    no active plugin implements this hook, all parameters train.

    From here on ``run`` has ``model``, and with it all its members.
    """


@hookspec
def sft_parameter_groups(run: Run, groups: list[ParameterGroup]) -> None:
    """Change the optimizer's groups in place. Every trainable parameter must be in exactly one afterwards."""


# --- events of a run ----------------------------------------------------------------------------------------


@hookspec
def sft_restore(run: Run, state: dict[str, Any]) -> None:
    """Take back what this plugin's :func:`sft_state` gave when the checkpoint was written.

    Called when a run resumes, when it goes back to its best checkpoint at the end (``load_best_model_at_end``), and
    when a checkpoint is only measured (``do_train false``).
    """


@hookspec
def sft_run_started(run: Run) -> None:
    """Everything is in place; the first step is next."""


@hookspec
def sft_micro_batch(run: Run, batch: Batch) -> None:
    """``batch`` is about to go forward and backward in training; draws are a function of seed and step.

    Where processes of a run have different numbers of micro-batches and wait for each other, some go through the model
    in vain, with a batch of nothing: the model is in evaluation mode then, and this is not called."""


@hookspec
def sft_step_ended(run: Run, record: dict[str, Any]) -> None:
    """An optimizer step is done. ``record`` has ``step``, ``epoch``, ``loss`` (mean over target tokens),
    ``learning_rate``, ``grad_norm``, ``tokens``, ``target_tokens``, ``padding_tokens`` of this step. It is a copy."""


@hookspec
def sft_evaluated(run: Run, record: dict[str, Any]) -> None:
    """An evaluation is done. ``record`` has ``step``, ``epoch``, ``eval_loss`` (mean over target tokens, nats),
    ``eval_ppl`` (its exponential), ``eval_accuracy`` (share of target tokens that are the likeliest token),
    ``eval_tokens``, ``eval_seconds``, and with ``eval_with_do_generation`` the scores of the model's own answers,
    0 to 1: ``eval_bleu4``, ``eval_rouge1``, ``eval_rouge2``, ``eval_rougel``. It is a copy.

    The first one, of ``step`` 0, comes before :func:`sft_run_started`; with ``do_train false`` only
    :func:`sft_run_ended` follows."""


@hookspec
def sft_state(run: Run) -> dict[str, Any]:
    """What this plugin needs to go on from a checkpoint: JSON values and numpy arrays by name.

    Where checkpoints are to be written it is also asked for once before the first step, to see that it can be kept.
    """


@hookspec
def sft_checkpoint_saved(run: Run, folder: Path) -> None:
    """``folder`` is complete under its final name."""


@hookspec
def sft_run_ended(run: Run, summary: Summary) -> None:
    """The result has been written to ``run.output_dir`` and measured (with ``do_train false``: the model was); run.json
    says so. ``summary`` is a copy, of which ``speaks`` is taken back: False leaves telling the user to another process.

    All plugins are told, also where one of them raises an error; the first error is raised afterwards, and the run has
    finished all the same: :func:`sft_run_failed` is not called after this.

    Called in the processes that do the run, not in one that starts them (:func:`sft_launch`)."""


@hookspec
def sft_run_failed(run: Run, error: BaseException) -> None:
    """The run ends with ``error``, or was interrupted; after this the caller of :func:`sft.run` gets it. Where the run
    had begun to write, run.json says so.

    Called for everything that goes wrong from when :func:`sft_check` has passed until :func:`sft_run_ended`. All
    plugins are told. What ended the run cannot be changed here: an error that is raised here is said, and no more.
    ``run`` has the members that it had when that happened. The process that starts others for the run
    (:func:`sft_launch`) hears of it too, unless the run has finished there: what goes wrong after that is no failure.
    """


# --- adapters on disk ---------------------------------------------------------------------------------------


@single
def sft_export_adapter(run: Run, model: Any) -> AdapterFiles:
    """The trained adapter in the PEFT layout, loadable over the original base. Without one: the whole model is
    written.

    The config holds JSON values, ``peft_type`` among them, and the tensors are of dtypes that safetensors knows. Every
    trainable parameter must have a part in it. Before the first step it is called some times, with changed
    values, to see that; so it may change nothing."""


@single
def sft_import_adapter(model: Any, folder: Path) -> bool:
    """Adapt ``model`` with the adapter in ``folder``, for inference. Called for folders that the plugin's metadata
    claims (``adapter.TYPE``, or ``adapter.TYPE.K``: docs/plugins.md); return True."""


@single
def sft_adapter_merger(folder: Path) -> AdapterMerger:
    """What folds the adapter in ``folder`` into base weights."""
