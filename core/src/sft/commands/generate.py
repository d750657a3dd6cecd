"""``sft generate``: answers to prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sft.commands.completing import complete_path
from sft.commands.shared import (
    GENERATION,
    SEED,
    TEMPLATE,
    lines_of_standard_input,
    model_options,
    path_of,
    put_out,
    say,
    setting_options,
    tools_option,
    typed_values,
)
from sft.conversations import Conversation, Turn
from sft.errors import UsageError
from sft.progress import Progress, Task
from sft.settings.arguments import Settings, check_draw

if TYPE_CHECKING:
    from sft.inference.open import Opened

BATCH_SIZE = 8
USES = ("sft generate", ("sft_model_family", "sft_model_config", "sft_quantizer", "sft_kernels", "sft_record_format"))


@click.command(name="generate")
@model_options("A quantizer, where the adapter does not name it; no:NAME leaves one out.")
@click.option("--prompt", "prompts", multiple=True, help="A prompt; repeatable.")
@click.option(
    "--prompts_file", "--prompts-file", "file", callback=path_of, shell_complete=complete_path,
    help="A file of prompts, one a line, or of data records (.json, .csv and so on), whose last answer is left out or "
    'missing; {"prompt": TEXT} is one too. Tools that a record has are offered.',
)  # fmt: skip
@tools_option("for prompts whose records have none")
@setting_options("chat_template", "enable_thinking", *GENERATION, chat_template=TEMPLATE, seed=SEED)
@click.option(
    "--batch_size", "--batch-size", type=click.IntRange(1), metavar="N",
    help=f"Prompts that are answered together.  [default: {BATCH_SIZE}; 1 when streaming]",
)  # fmt: skip
@click.option(
    "--stream/--no-stream", default=None,
    help="Print an answer as it grows.  [default: in a terminal, for a single prompt]",
)  # fmt: skip
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON object a line: prompt, answer, and any calls of tools and reference.",
)
def command(
    model: str,
    adapter: str | None,
    plugins: tuple[str, ...],
    prompts: tuple[str, ...],
    file: str | None,
    tools: str | None,
    batch_size: int | None,
    stream: bool | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Answer prompts, through the model's chat template where it has one.

    Without --prompt and --prompts_file, each line of standard input is a prompt. Answers go to standard output,
    everything else to standard error. The likeliest token is taken at each step (top_k 1); --top_k 0 or another
    number draws, with top_p and temperature.

    Calls of tools stand in an answer as the model writes them; those that can be read are told on standard error too,
    and with --json as calls.
    """
    from sft.data.calls import read_tools
    from sft.inference.asked import of_file, of_texts
    from sft.inference.open import opened, settings_for

    if prompts and file:
        raise UsageError("--prompt and --prompts_file are both given; leave one of them out.")
    if not all(map(str.strip, prompts)):
        raise UsageError("A --prompt is blank; write something.")
    if stream and (as_json or (batch_size or 1) > 1):
        raise UsageError("--stream prints one answer at a time, as text; leave --json and --batch_size out.")
    folder = Path(adapter) if adapter else None
    chosen, active = settings_for(folder, plugins, {"model_name_or_path": model, **typed_values(settings)}, USES)
    check_draw(chosen.generation)
    offered = read_tools(Path(tools)) if tools else ()
    questions = list(of_file(Path(file), active) if file else of_texts(prompts or _standard_input()))
    questions = [(turns if turns.tools else Conversation(turns, turns.place, offered), a) for turns, a in questions]
    if not questions:
        raise UsageError(f"{file or 'Standard input'} has no prompt; give --prompt TEXT, a file or lines of text.")
    if stream is None:
        stream = len(questions) == 1 and sys.stdout.isatty() and not as_json
    size = 1 if stream else batch_size or BATCH_SIZE
    with opened(chosen, active, folder, say) as found:
        _answer(found, chosen, questions, size, stream, as_json)


def _answer(
    found: Opened, chosen: Settings, questions: list[tuple[Conversation, Turn | None]], size: int, stream: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Answer the ``questions``, ``size`` at a time, and print the answers."""
    from sft.data.calls import calls_in, shown_call
    from sft.data.encoding import checked
    from sft.data.questions import encode_prompt, reference_of
    from sft.models.generation import answers, check_room, unit

    generation, tokenizer = chosen.generation, found.tokenizer
    encoded = [checked(lambda turns: encode_prompt(turns, tokenizer), turns) for turns, _ in questions]
    for ids in encoded:  # before the first answer
        check_room(ids, generation, found.model.architecture.positions)
    with (
        # A stream of answers itself shows how far it is.
        Progress((lambda _: None) if stream else say) as progress,
        progress.task("answering", unit(len(questions)), len(questions), of_units=False) as task,
        found.precision.autocast(),
    ):
        for start in range(0, len(questions), size):
            batch, show = encoded[start : start + size], _show if stream else None
            advanced = partial(_advance, task, start)
            texts = answers(found.model, tokenizer, batch, generation, chosen.training.seed, show, advanced)
            for text, (turns, answer) in zip(texts, questions[start : start + size], strict=True):
                calls = calls_in(text, turns.tools)[1]
                if as_json:
                    line: dict[str, Any] = {"prompt": turns[-1].content, "answer": text}
                    if calls:
                        line["calls"] = [{"name": call.name, "arguments": call.arguments} for call in calls]
                    if answer is not None:
                        line["reference"] = reference_of(turns, answer, tokenizer)
                    put_out(json.dumps(line, ensure_ascii=False))
                else:
                    put_out("" if stream else text)
                    for call in calls:
                        say(f"call: {shown_call(call)}")


def _advance(task: Task, before: int, tokens: int, answers: float) -> None:
    task.advance(tokens, before + answers)


def _show(piece: str) -> None:
    put_out(piece, nl=False)


def _standard_input() -> Iterator[str]:
    if sys.stdin.isatty():
        say("a prompt on each line; Ctrl-D ends")
    return (line.rstrip("\r\n") for line in lines_of_standard_input())
