"""Every hook, in the order in which a run calls them. Reading this page explains the framework.

Any number of active plugins may implement a ``@hookspec``; each is called after the plugins that it ``requires``, and
otherwise in ascending ``order``. Only one active plugin may implement a ``@single`` hook: if two do, the run is
refused, naming both, before anything heavy happens. A hook that refuses something raises :class:`sft.UsageError` with
the cause and the cure in one sentence.

Objects that cross a hook are described in ``seams.py``, those of data in ``conversations.py``. ``run`` is
:class:`sft.Run`. Its members appear as the run goes on: where a hook below says that ``run`` has a member "from here
on", that hook and every later one can use it. Reading it earlier raises :class:`sft.TooEarlyError`, which names the
hook to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.context import Run, Summary
from sft.plugins.marks import hookspec, single

if TYPE_CHECKING:
    import click

    from sft.conversations import Turn
    from sft.models.architecture import ModelShape
    from sft.models.families.family import Family
    from sft.models.finished import FinishedModel
    from sft.models.kernels import Kernels
    from sft.optimizer import Optimizer
    from sft.precision import Precision
    from sft.seams import (
        AdapterFiles,
        AdapterMerger,
        AttentionBackend,
        Batch,
        DataCollator,
        Objective,
        ParallelStrategy,
        ParameterGroup,
        Quantizer,
        TokenLoss,
    )

# --- the command line ---------------------------------------------------------------------------------------


@hookspec
def sft_commands(cli: click.Group) -> None:
    """Add click commands to ``cli``. Called when a command that the plugin's metadata names is typed."""


# --- settings resolved, nothing heavy done ------------------------------------------------------------------


@hookspec
def sft_check(run: Run) -> None:
    """Refuse settings that do not go together. Neither data nor weights have been read yet, so keep it instant.

    From here on ``run`` has ``settings``, ``given``, ``plugins``, ``hook``, ``progress``, ``control``, ``say``,
    ``output_dir`` and ``rng``.
    """


@single
def sft_launch(run: Run) -> Summary | None:
    """Carry out the run somewhere else, for example in processes started with the settings ``run.given``, and return
    its summary. If no plugin implements this, or it returns None, the run happens in this process.

    In a process that starts others, no hook is called after this one except :func:`sft_run_failed`. A signal that ends
    that process may be raised as :class:`SystemExit`."""


# --- where the data is --------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def sft_data_source(run: Run, name: str, split: str) -> list[Path] | None:
    """The files that hold a ``split`` of the data that ``name`` means, or None if the plugin does not open such names.

    ``name`` is a place that ``dataset_name_or_path`` names: ``hf://owner/name``, or whatever a plugin understands. The
    plugins are asked before the core takes it for a file or folder. ``split`` is ``train``, ``dev`` (also what a source
    calls validation) or a name that the settings give. Return the paths of files on this machine, in order, that the
    core reads: .json, .jsonl, .csv or .parquet. They must hold the same bytes whenever the same data is opened, for a
    run that is resumed finds its place in them. An empty list says that there is no ``dev`` split; for another split
    that is not there raise :class:`sft.UsageError`. Each process of a run asks.

    Also called by ``sft evaluate``. A distribution whose metadata answers ``source.SCHEME`` is active wherever data of
    that scheme is named.
    """


# --- the model's config -------------------------------------------------------------------------------------


@hookspec
def sft_model_family(config: dict[str, Any]) -> Family | None:
    """How to read a model with this ``config.json``, or None if the plugin does not handle it.

    Every active plugin is asked wherever a model is opened. If two of them answer, or one answers for a family that sft
    has itself, the model is refused with their names. The reader of an :class:`sft.Family` makes an
    :class:`sft.Architecture`, which sft's decoder computes; or the family builds a class of its own that keeps to
    :class:`sft.LanguageModel` (docs/plugins.md). An adapter's file names the plugin that read its base, and brings it
    back.
    """


@hookspec
def sft_model_config(run: Run | None, config: dict[str, Any]) -> None:
    """Change the content of the model's ``config.json`` in place: JSON values under Hugging Face's names.

    The rotary embedding is described by ``rope_theta``, ``rope_scaling`` (null, or an object with ``rope_type``) and
    ``partial_rotary_factor``, whatever the file calls them; a file that gives each layer type settings of its own keeps
    its spelling. The changed config is read as if the file had said so, and what the decoder cannot compute is refused.

    Called wherever a model is opened, before data is read. Outside a run, ``run`` is None and only the plugin's options
    count. An adapter's file names the plugins that changed its base's config, with their options, and brings them back;
    the ``config.json`` of a whole model contains the changes.

    From here on ``run`` has ``source``.
    """


# --- data ---------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def sft_record_format(record: dict[str, Any]) -> list[Turn] | None:
    """The turns of one record of a data file, or None if it is not in this plugin's format. Where the record offers
    tools, or weighs anything but 1, they are a :class:`sft.Conversation`: a list of turns with ``tools`` and a
    ``weight``. A record that is several conversations, such as two answers to one question, is the first of them with
    the others ``beside`` it: they stay in one row, as documents that do not see each other, and are kept or dropped
    together.

    Called before the core tries its own formats. In training and evaluation at least one turn must be marked
    ``trains``; for ``sft generate`` the record may end with a user's turn instead. For a record that is in the format
    but wrong, raise ``ValueError`` with the reason: the core adds file and line.

    Records come in their order, and to the run's own process, however many processes encode them
    (``dataset_num_proc``); those of a stream (``lazy``) come while the model trains, from another thread. With
    ``encoded_cache`` the answer must depend on the record and on the plugin's options and code alone: what has been
    encoded before is not asked for again.
    """


@single
def sft_collator(run: Run) -> DataCollator:
    """Which records share a row, and how rows become batches. By default each record is a row, padded on the right.

    From here on ``run`` has ``resumes``, ``tokenizer``, ``precision`` and ``step``.
    """


# --- the model ----------------------------------------------------------------------------------------------


@single
def sft_parallel_strategy(run: Run) -> ParallelStrategy:
    """How several processes share the run, from reading the weights on. By default there is one process."""


@single
def sft_quantizer(run: Run | None) -> Quantizer:
    """What takes the place of the transformer blocks' Linear layers while weights stream in.

    Where a model is loaded outside a run, for answers, ``sft evaluate`` or ``sft merge``, ``run`` is None and only the
    plugin's options count. By default layers stay Linear layers, with weights as ``run.precision`` says.

    From here on ``run`` has ``strategy``.
    """


@single
def sft_attention_backend(run: Run, config: ModelShape) -> AttentionBackend | None:
    """How attention is computed in training and evaluation. None, or no plugin: by the model's
    kernels (:meth:`sft.Kernels.attention`).

    ``config`` describes the model: an :class:`sft.Architecture` if sft's own decoder computes it. A backend declares
    what it can do beyond plain attention (see :class:`sft.AttentionBackend`); a model that needs more is refused.
    """


@hookspec
def sft_adapt_model(run: Run, model: Any) -> None:
    """The adapter seam: weights are in place; replace or wrap layers, and set what trains (``stop_gradient``).

    :func:`sft.target_layers` gives the layers to adapt, ``run.strategy.linear_weight`` the whole weight of one. What
    takes a layer's place is a :class:`sft.AdapterLayer`, whose ``sides`` say how processes divide it. If no active
    plugin implements this hook, all parameters train.

    From here on ``run`` has ``model``, and with it all its members.
    """


@single
def sft_kernels(run: Run | None, precision: Precision) -> Kernels | None:
    """How the pieces of the model are computed, on the device that paddle uses now: norms, rotary embedding, Linears,
    the products of the loss. None, or no plugin: by the core's own.

    ``precision`` is that of the run, or of what is done with a model outside a run, where ``run`` is None. Kernels
    compute what :class:`sft.Kernels` computes, so they are not part of what is learned.
    """


@single
def sft_objective(run: Run) -> Objective | None:
    """What a step minimises, made of hidden states, the batch and the chunked loss. None, or no plugin: the mean
    cross-entropy of the targets, each of which counts what it weighs (:func:`sft_token_loss`).

    Evaluation measures the objective too (``eval_objective``), beside the plain cross-entropy, which remains
    ``eval_loss``. An objective sees the model as a whole, so it is refused where processes have only some of its
    layers; and beside token losses, which are no part of it."""


@hookspec
def sft_token_loss(run: Run) -> TokenLoss | None:
    """Another loss of each target token, made of its cross-entropy within the chunked loss: in training, and in
    evaluation as ``eval_objective``. Of several plugins each is given the loss that the one before it has made."""


@hookspec
def sft_parameter_groups(run: Run, groups: list[ParameterGroup]) -> None:
    """Change the optimizer's groups in place. Every trainable parameter must be in exactly one afterwards."""


@single
def sft_optimizer(run: Run, groups: list[ParameterGroup]) -> Optimizer | None:
    """What steps the parameters of ``groups``: an :class:`sft.Optimizer` of exactly these. None, or no plugin:
    :class:`sft.AdamW`.

    ``groups`` are as :func:`sft_parameter_groups` left them, with what this process steps under each name: the
    parameter, or a piece of it, flat. What the optimizer keeps of them is in checkpoints and comes back by itself.
    """


@single
def sft_schedule(run: Run, total: int) -> Callable[[int], float] | None:
    """The learning rate of each of ``total`` optimizer steps, by its number from 1. None, or no plugin: by the core's
    schedules.

    The rate must depend on that number and on settings alone: a run that goes on from a checkpoint asks for later steps
    only, and every process asks. ``run.settings.training`` has ``learning_rate``, the peak, and ``warmup_of(total)``.
    """


# --- events of a run; each may ask to stop, to save or to evaluate (``run.control``) --------------------------


@hookspec
def sft_restore(run: Run, state: dict[str, Any], why: str, step: int) -> None:
    """Restore what this plugin's :func:`sft_state` returned when the checkpoint of ``step`` was written.

    ``why`` is "resume" where the run goes on from that step, "best" where it goes back to its best checkpoint at its
    end (``load_best_model_at_end``; ``run.step`` stays the last one), and "measure" where the checkpoint is only
    measured (``do_train false``).
    """


@hookspec
def sft_run_record(run: Run) -> dict[str, Any]:
    """What ``run.json`` says of this plugin, beside its settings: JSON values, which stand there as
    ``of_plugins.PLUGIN`` from before the first step on. A run that goes on from a checkpoint writes ``run.json`` anew;
    what it is to remember goes through :func:`sft_state`.

    Every process is asked; what the main one answers is written. Nothing is written of an empty answer."""


@hookspec
def sft_run_started(run: Run) -> None:
    """Everything is in place; the first step is next."""


@hookspec
def sft_micro_batch(run: Run, batch: Batch) -> None:
    """``batch`` is about to go forward and backward in training. Random numbers drawn from paddle depend on seed and
    step alone.

    A process that has several parts of the model, with others in between (an interleaved pipeline), calls this before
    each of them, with one and the same ``batch``.

    Processes that wait for each other may have different numbers of micro-batches. One that has run out sends a batch
    of nothing through the model, in evaluation mode; this hook is not called for it."""


@hookspec
def sft_step_ended(run: Run, record: dict[str, Any]) -> None:
    """An optimizer step is done. ``record`` has ``step``, ``epoch``, ``loss`` (mean over target tokens, each
    of which counts what it weighs; or of what else the run minimises), ``learning_rate``, ``grad_norm``, ``tokens``,
    ``target_tokens``, ``padding_tokens`` of this step, and the values that its objective has a name for. It is a
    copy."""


@hookspec
def sft_metrics(run: Run, record: dict[str, Any]) -> dict[str, float]:
    """Numbers of the plugin's own for the line that ``record``, a copy, is about to be: that of a logged step, or of an
    evaluation, which has ``eval_loss``.

    Each stands there as ``PLUGIN/NAME``, so no two can meet; it is in ``metrics.jsonl``, in what :func:`sft_evaluated`
    and :func:`sft_logged` are given, and among what the user sees. Every process is asked, and may sum over the others
    (``run.strategy.sum``); what the main one answers is written. A number that is not finite is left out, and the user
    told so once."""


@hookspec
def sft_evaluated(run: Run, record: dict[str, Any]) -> None:
    """An evaluation is done. ``record`` has ``step``, ``epoch``, ``eval_loss`` (mean over target tokens, nats),
    ``eval_ppl`` (its exponential), ``eval_accuracy`` (share of target tokens that are the likeliest token),
    ``eval_tokens``, ``eval_seconds``; where a run minimises something else than cross-entropy also
    ``eval_objective``, the mean of that, and ``eval_NAME`` of each value that the objective has a name for; of several
    data sets also ``eval_sets``, these but for the seconds of each, by its name; and
    with ``eval_with_do_generation`` the scores of the model's own answers,
    0 to 1: ``eval_bleu4``, ``eval_rouge1``, ``eval_rouge2``, ``eval_rougel``. It is a copy.

    The first evaluation, of ``step`` 0, comes before :func:`sft_run_started`. With ``do_train false`` it is the only
    one, and :func:`sft_run_ended` follows."""


@hookspec
def sft_logged(run: Run, record: dict[str, Any]) -> None:
    """A line has been written to ``metrics.jsonl``. ``record``, a copy, is that line: an evaluation, as
    :func:`sft_evaluated` has it, or a logged step (``logging_steps``; the first and the last always).

    A logged step has ``step``, ``epoch``, ``loss`` (mean over the target tokens since the line before),
    ``learning_rate`` and ``grad_norm`` (of this step), ``peak_memory_mib``, and, since the line before, ``seconds``,
    ``tokens``, ``target_tokens`` and ``padding_tokens``. Both have what plugins measure (:func:`sft_metrics`).

    Called in every process; the main one has written the line."""


@hookspec
def sft_state(run: Run) -> dict[str, Any]:
    """What this plugin needs to go on from a checkpoint: JSON values and numpy arrays by name.

    If checkpoints are to be written, it is also called once before the first step, to see that its answer can be saved.
    """


@hookspec
def sft_checkpoint_saved(run: Run, folder: Path) -> None:
    """``folder`` is complete under its final name."""


@hookspec
def sft_run_ended(run: Run, summary: Summary) -> None:
    """The result has been written to ``run.output_dir`` and measured, and run.json says so. (With ``do_train false``
    the model has been measured, and there is no result.) ``summary`` is a copy. The core reads one field of it again:
    set ``speaks`` to False, and this process leaves it to another one to tell the user.

    Every plugin is called, even if one of them raises an error. The first error is raised afterwards, but the run
    counts as finished: :func:`sft_run_failed` is not called after this.

    Called in the processes that carry out the run, not in one that only starts them (:func:`sft_launch`)."""


@hookspec
def sft_run_failed(run: Run, error: BaseException) -> None:
    """The run ends with ``error``, or was interrupted. Afterwards the error goes to the caller of :func:`sft.run`. If
    the run had begun to write its folder, run.json says so.

    Called for anything that goes wrong after :func:`sft_check` and before :func:`sft_run_ended`, for every plugin.
    ``error`` cannot be replaced: an error raised here is shown to the user, and no more. ``run`` has the members that
    it had at that moment. In a process that starts others for the run (:func:`sft_launch`) this is called too, unless
    the run has finished in them: what goes wrong after that is no failure.
    """


@hookspec
def sft_memory_advice(values: dict[str, Any], device: str, memory: int) -> str | None:
    """What would fit, where a run has run out of memory on a ``device`` ("cpu" or "gpu") that has ``memory`` bytes: a
    clause such as "with --recompute true it needs 3.1 GiB". None if there is nothing to say. ``values`` are the run's
    settings, by name as they came.

    Called for installed plugins whose metadata answers ``advice.memory``, active in that run or not."""


@hookspec(firstresult=True)
def sft_memory_need(values: dict[str, Any], device: str, memory: int) -> int | None:
    """The bytes that training needs at most on a ``device`` ("cpu" or "gpu") that has ``memory`` bytes, of the
    process that needs most: for weights, gradients, the optimizer's state and what is kept to compute them, not for the
    program and the data. None if the plugin cannot say. ``values`` are the run's settings, by name as they came.

    Called before the first step, of installed plugins whose metadata answers ``advice.memory``, active in that run or
    not; the run's plan says it."""


# --- adapters on disk ---------------------------------------------------------------------------------------


@single
def sft_export_adapter(run: Run, model: Any) -> AdapterFiles:
    """The trained adapter in PEFT's layout, to be loaded over the original base. By default the whole model is written.

    The config holds JSON values, ``peft_type`` among them, and the tensors have dtypes that safetensors knows. Every
    trainable parameter must have a part in the files. To check that, the core calls this several times before the first
    step, with changed parameters; so it must not change anything itself."""


@single
def sft_import_adapter(model: Any, folder: Path, hook: Any) -> bool:
    """Put the adapter in ``folder`` over ``model``, for inference, and return True. Called for folders that the
    plugin's metadata claims (``adapter.TYPE``, or ``adapter.TYPE.K``: docs/plugins.md).

    ``hook`` calls hooks, also those that the plugin publishes for its refinements, as ``run.hook`` does in a run."""


@single
def sft_adapter_merger(folder: Path, hook: Any) -> AdapterMerger:
    """What folds the adapter in ``folder`` into base weights. ``hook`` calls hooks, as in
    :func:`sft_import_adapter`."""


@single
def sft_adapter_updates(folder: Path, hook: Any) -> dict[str, tuple[Any, Any]] | None:
    """The adapter in ``folder`` as updates of low rank: for each layer that it changes, by Hugging Face's name without
    ``.weight``, numpy float32 A [in, r] and B [r, out], so that the layer computes x · (W + A·B) over the original
    base. Of the embedding, ``in`` is the vocabulary. None where it is more than that.

    Called where a plugin writes an adapter alone (:meth:`sft.FinishedModel.updates`). ``hook`` calls hooks, as in
    :func:`sft_import_adapter`."""


# --- a finished model in another form -------------------------------------------------------------------------


@hookspec(firstresult=True)
def sft_export(model: FinishedModel, to: str, folder: Path) -> list[Path] | None:
    """Write ``model``, with its adapter folded in, into ``folder`` in the form that ``to`` names, and return the paths
    of what was written; None if the plugin does not write that form.

    Called by ``sft export --to FORM``. A distribution whose metadata answers ``export.FORM`` is active then, and its
    options are given as ``--name value``. ``folder`` is there and empty; under the name that the user gave it appears
    when all is written, or not at all. Every tensor of ``model.names`` must be read: a plugin that leaves one out has
    written another model, and is refused."""
