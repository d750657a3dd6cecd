"""``sft evaluate``, ``sft generate`` and ``sft chat`` as they are typed."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import click.testing
import pytest
from typed_commands import MODEL, Type

import sft
from sft.commands.chat import Chat, CtrlC
from sft.conversations import Turn
from sft.data.questions import encode_prompt
from sft.inference.evaluate import evaluate_finished
from sft.inference.open import Opened, load_for_inference
from sft.models.source import find_model
from sft.precision import Precision
from sft.settings.arguments import GenerationArguments


@pytest.fixture
def alone(paddle: Any, models: Path) -> Callable[..., str]:
    """The answer to a text or to turns, computed by itself."""
    from sft.models.generation import answers

    model, tokenizer = load_for_inference(str(find_model(str(models / MODEL)).path), None, lambda text: None)

    def found(prompt: str | list[Turn], seed: int = 42, **settings: Any) -> str:
        turns = [Turn("user", prompt)] if isinstance(prompt, str) else prompt
        prompt, generation = encode_prompt(turns, tokenizer), GenerationArguments(**{"max_new_tokens": 6, **settings})
        return answers(model, tokenizer, [prompt], generation, seed)[0]

    return found


# --- sft evaluate -------------------------------------------------------------------------------------------


def test_evaluate_prints_one_line_of_json_and_nothing_else(typed: Type, models: Path, dataset: Path) -> None:
    settings = {"max_length": 60, "src_length": 50, "per_device_eval_batch_size": 3, "max_new_tokens": 5}
    line = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    line += ["--eval_with_do_generation", "--dataset_name_or_path", str(dataset)]
    result = typed("evaluate", *line, "--json")
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    values = {"model_name_or_path": str(models / MODEL), "dataset_name_or_path": str(dataset), **settings}
    expected = evaluate_finished({**values, "eval_with_do_generation": True}, None, lambda text: None)
    assert {**found, "eval_seconds": 0} == {**expected, "eval_seconds": 0}
    assert "dev data: 7 records" in result.stderr
    plain = [*line[:6], "--eval_with_do_generation", "false", *line[-2:]]
    shown = typed("evaluate", *plain).stdout.splitlines()
    assert shown[0] == f"loss {expected['eval_loss']:.4f}"
    assert [text.split()[0] for text in shown] == ["loss", "ppl", "accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "dataset_name_or_path is not set"),
        (["--max_length", "1"], "max_length: expected a whole number of at least 2"),
        (["--top_p", "0.5"], "temperature and top_p do nothing while top_k is 1"),
        (["--seed", "3"], "seed: no answers are asked for; set eval_with_do_generation, or leave it out"),
        (["--eval_with_do_generation", "perhaps"], "expected true or false"),
    ],
)
def test_evaluate_refuses(typed: Type, dataset: Path, arguments: list[str], message: str) -> None:
    data = ["--dataset_name_or_path", str(dataset)] if arguments else []
    with pytest.raises(sft.UsageError, match=message):
        typed("evaluate", *data, *arguments)


# --- sft generate -------------------------------------------------------------------------------------------

SHORT = ("--max_new_tokens", "6")


def test_prompts_from_everywhere_have_the_same_answers(typed: Type, alone: Any, tmp_path: Path) -> None:
    """Options, a text file, records and standard input; one at a time, in twos and together."""
    prompts = ["coat", "What is a river?", "type#dress"]
    expected = "".join(alone(prompt) + "\n" for prompt in prompts)
    text, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\n\n".join(prompts))
    records.write_text("\n".join(json.dumps({"src": prompt, "tgt": "x"}) for prompt in prompts))
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert typed("generate", *SHORT, *options).stdout == expected
    assert typed("generate", *SHORT, *options, "--batch_size", "2").stdout == expected
    assert typed("generate", *SHORT, *options, "--stream").stdout == expected
    assert typed("generate", *SHORT, "--prompts_file", str(text), "--batch-size", "1").stdout == expected
    assert typed("generate", *SHORT, "--prompts-file", str(records)).stdout == expected
    assert typed("generate", *SHORT, lines="\n".join(prompts) + "\n").stdout == expected


def test_records_are_answered_instead_of_their_last_answer(typed: Type, alone: Any, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"src": ["one", "zwölf"], "tgt": ["1", "12 世"]}], ensure_ascii=False))
    (line,) = typed("generate", *SHORT, "--prompts_file", str(path), "--json").stdout.splitlines()
    expected = alone([Turn("user", "one"), Turn("assistant", "1"), Turn("user", "zwölf")])
    assert json.loads(line) == {"prompt": "zwölf", "answer": expected, "reference": "12 世"}
    assert "12 世" in line
    (line,) = typed("generate", *SHORT, "--prompt", "coat", "--json").stdout.splitlines()
    assert json.loads(line) == {"prompt": "coat", "answer": alone("coat")}


def test_questions_of_every_format_are_answered(typed: Type, alone: Any, tmp_path: Path, distribute: Any) -> None:
    """Roles are those of training; a plugin's format is asked before {"prompt": TEXT} is taken for a prompt alone."""
    source = """
    import sft

    class Pairs(sft.Plugin):
        name = "pairs"
        api_version = 1

        @sft.hookimpl
        def sft_record_format(self, record):
            if "completion" in record:
                return [sft.Turn("user", record["prompt"] + "!"), sft.Turn("assistant", record["completion"], True)]
    """
    distribute("pairs", source, {"pairs": "Pairs"})
    path = tmp_path / "asked.jsonl"

    def answered(record: dict[str, Any], *options: str) -> Any:
        path.write_text(json.dumps(record))
        (line,) = typed("generate", *SHORT, *options, "--prompts_file", str(path), "--json").stdout.splitlines()
        return json.loads(line)

    talk = [("human", "Hi"), ("gpt", "ok"), ("human", "coat")]
    turns = [Turn("user", "Hi"), Turn("assistant", "ok"), Turn("user", "coat")]
    expected = {"prompt": "coat", "answer": alone(turns)}
    assert answered({"conversations": [{"from": role, "value": text} for role, text in talk]}) == expected
    assert answered({"messages": [{"role": role, "content": text} for role, text in talk]}) == expected
    assert answered({"src": ["Hi", "coat"], "tgt": ["ok"]}) == expected
    record = {"prompt": "coat", "completion": "warm"}
    assert answered(record) == {"prompt": "coat", "answer": alone("coat")}
    expected = {"prompt": "coat!", "answer": alone("coat!"), "reference": "warm"}
    assert answered(record, "--plugin", "pairs") == expected


def test_draws_follow_the_options(typed: Type, alone: Any) -> None:
    drawn = ("--top_k", "0", "--temperature", "1.5", "--top-p", "0.95")
    settings = {"top_k": 0, "temperature": 1.5, "top_p": 0.95}
    for seed in (1, 2):
        found = typed("generate", *SHORT, *drawn, "--seed", str(seed), "--prompt", "coat").stdout
        assert found == alone("coat", seed, **settings) + "\n"
    assert alone("coat", 1, **settings) != alone("coat", 2, **settings)


def test_another_chat_template_is_used(typed: Type, paddle: Any, models: Path, dataset: Path) -> None:
    """Without one, a prompt is its text alone; all three commands take it."""
    from sft.models.generation import answers

    plain = load_for_inference(str(models / MODEL), None, lambda text: None, chat_template="none")
    prompt = encode_prompt([Turn("user", "coat")], plain[1])
    expected = answers(*plain, [prompt], GenerationArguments(max_new_tokens=6), 42)[0] + "\n"
    option = ("--chat_template", "none")
    assert typed("generate", *SHORT, *option, "--prompt", "coat").stdout == expected
    assert typed("chat", *SHORT, *option, lines="coat").stdout == expected
    assert typed("generate", *SHORT, "--prompt", "coat").stdout != expected
    data = ("--dataset_name_or_path", str(dataset), "--json")
    losses = [json.loads(typed("evaluate", *data, *more).stdout)["eval_loss"] for more in ((), option)]
    assert abs(losses[0] - losses[1]) > 0.01


@pytest.mark.parametrize(
    ("arguments", "lines", "message"),
    [
        ([], "\n \n", "Standard input has no prompt"),
        (["--prompt", "a", "--prompt", " "], None, "A --prompt is blank"),
        (["--prompt", ""], "a", "A --prompt is blank"),
        (["--prompts_file", "missing.txt"], None, "missing.txt cannot be read"),
        (["--prompts_file", "missing.jsonl"], None, "missing.jsonl cannot be read"),
        (["--prompt", "a", "--prompts_file", "b.txt"], None, "--prompt and --prompts_file are both given"),
        (["--prompt", "a", "--stream", "--json"], None, "--stream prints one answer at a time"),
        (["--prompt", "a", "--stream", "--batch_size", "2"], None, "--stream prints one answer at a time"),
        (["--prompt", "a", "--temperature", "2"], None, "temperature and top_p do nothing while top_k is 1"),
        (["--prompt", "a", "--top_k", "-1"], None, "top_k: expected a whole number of at least 0"),
        (["--prompt", "a", "--max_new_tokens", "64"], None, "do not fit into the model's 64 positions"),
    ],
)
def test_generate_refuses(typed: Type, arguments: list[str], lines: str | None, message: str) -> None:
    with pytest.raises(sft.UsageError, match=message):
        typed("generate", *arguments, lines=lines)


def test_a_document_asks_nothing(typed: Type, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('{"text": "A coat."}\n')
    with pytest.raises(sft.UsageError, match=r"prompts.json, line 1: this record asks nothing; take it out, or"):
        typed("generate", *SHORT, "--prompts_file", str(path))


def test_a_plugin_without_a_part_in_it_is_refused(typed: Type, distribute: Any) -> None:
    distribute(
        "idle", "import sft\n\nclass Idle(sft.Plugin):\n    name = 'idle'\n    api_version = 1\n", {"idle": "Idle"}
    )
    for name in ("generate", "chat"):
        with pytest.raises(sft.UsageError, match=f"Plugin idle has no part in sft {name}; leave it out"):
            typed(name, "--plugin", "idle", lines="a\n")


# --- sft chat -----------------------------------------------------------------------------------------------


def test_lines_are_turns_and_the_conversation_is_remembered(typed: Type, alone: Any) -> None:
    first = alone("Hi")
    second = alone([Turn("user", "Hi"), Turn("assistant", first), Turn("user", "coat")])
    assert second != alone("coat")
    result = typed("chat", *SHORT, lines="Hi\n\ncoat\n")
    assert result.stdout == f"{first}\n{second}\n"


def test_commands_of_the_chat(typed: Type, alone: Any) -> None:
    system = [Turn("system", "be kind"), Turn("user", "coat")]
    assert alone(system) != alone("coat")
    lines = ["coat", "/reset", "coat", "/reset", "/system be kind", "coat", "/reset", "/system", "coat", "/nonsense"]
    result = typed("chat", *SHORT, lines="\n".join([*lines, "/exit", "coat"]))
    assert result.stdout == "".join(
        text + "\n" for text in (alone("coat"), alone("coat"), alone(system), alone("coat"))
    )
    assert "there is no /nonsense" in result.stderr
    assert typed("chat", *SHORT, "--system", "be kind", lines="coat").stdout == alone(system) + "\n"


def test_the_oldest_turns_are_forgotten_and_it_is_said(typed: Type, alone: Any) -> None:
    """64 positions hold two short questions, not three."""
    result = typed("chat", *SHORT, lines="one\ntwo\nthree\n")
    answers = result.stdout.split("\n")
    talk = [Turn("user", "two"), Turn("assistant", answers[1]), Turn("user", "three")]
    assert answers[2] == alone(talk)
    assert "(2 old turns no longer fit into the model's positions and were left out)" in result.stderr


def test_a_question_without_room_is_refused_and_the_chat_goes_on(typed: Type, alone: Any) -> None:
    result = typed("chat", *SHORT, lines=f"{'long ' * 40}\ncoat\n")
    assert result.stdout == alone("coat") + "\n"
    assert "do not fit into the model's 64 positions" in result.stderr


def test_an_interrupted_answer_remains_as_far_as_it_was_given(paddle: Any, models: Path, alone: Any) -> None:
    model, tokenizer = load_for_inference(str(models / MODEL), None, lambda text: None)
    chat = Chat(Opened(model, tokenizer, Precision()), GenerationArguments(max_new_tokens=6), 42, None)

    pieces: list[str] = []

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("Hi", stop)
    given = chat.turns[1].content
    assert chat.turns == [Turn("user", "Hi"), Turn("assistant", given)]
    assert given
    assert alone("Hi").startswith(given)
    chat.ask("coat", pieces.append)
    assert len(chat.turns) == 4
    assert "".join(pieces) == alone([*chat.turns[:2], Turn("user", "coat")])


def test_ctrl_c_is_raised_where_it_is_expected_and_kept_where_it_is_not(paddle: Any, models: Path) -> None:
    """A signal before an answer stops that answer; one while the conversation is written down waits for the next."""
    model, tokenizer = load_for_inference(str(models / MODEL), None, lambda text: None)
    chat, ctrl_c = Chat(Opened(model, tokenizer, Precision()), GenerationArguments(max_new_tokens=6), 42, None), CtrlC()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)

    def press(piece: str = "") -> None:
        signal.raise_signal(signal.SIGINT)

    with ctrl_c.heard():
        press()
        press()
        with pytest.raises(KeyboardInterrupt):
            chat.ask("Hi", pytest.fail, ctrl_c)
        assert chat.turns == []
        with pytest.raises(KeyboardInterrupt):
            chat.ask("Hi", press, ctrl_c)
        assert [turn.role for turn in chat.turns] == ["user", "assistant"]

        def again() -> None:
            with ctrl_c:
                try:
                    press()
                finally:
                    press()  # while the first one is handled

        with pytest.raises(KeyboardInterrupt):
            again()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c.__enter__()
        with ctrl_c:
            time.sleep(0.3)  # the ticks do nothing
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# --- input that cannot be answered --------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_standard_input_that_is_not_utf8_is_named_by_its_line(typed: Type, command: str) -> None:
    with pytest.raises(sft.UsageError, match=r"Standard input, line 2 is not UTF-8 text .*; convert it\."):
        typed(command, "--max_new_tokens", "2", lines=b"hello\nso-so \xff\xfe\n")  # type: ignore[arg-type]


def test_a_prompt_without_a_token_is_refused(typed: Type, tmp_path: Path) -> None:
    (tmp_path / "nothing.jinja").write_text("{% if false %}{{ messages }}{% endif %}")
    with pytest.raises(sft.UsageError, match="A prompt has no token"):
        typed("generate", "--prompt", "hello", "--chat_template", str(tmp_path / "nothing.jinja"))


def test_a_token_beyond_the_vocabulary_is_refused(models: Path, tmp_path: Path, paddle: Any) -> None:
    """In a prompt; a tokenizer that knows one more token than its model answers all other prompts."""
    folder = tmp_path / "model"
    shutil.copytree(models / MODEL, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number in range(vocabulary - 320 + 1):
        tokenizer["added_tokens"].append({"id": 320 + number, "content": f"<{number}>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = import_module("sft.commands.generate").command
    line = ["--model_name_or_path", str(folder), "--max_new_tokens", "2", "--prompt"]
    run = click.testing.CliRunner().invoke
    assert run(command, [*line, "hello"], standalone_mode=False, catch_exceptions=False).exit_code == 0
    with pytest.raises(sft.UsageError, match=f"A prompt has the token id {vocabulary}, and the model's vocabulary has"):
        run(command, [*line, f"<{vocabulary - 320}>"], standalone_mode=False, catch_exceptions=False)


# --- what a finished model is measured with -----------------------------------------------------------------


def test_evaluate_takes_its_lengths_from_the_run(
    typed: Type, train: Callable[..., sft.Summary], models: Path, dataset: Path, tmp_path: Path
) -> None:
    """Of the result and of a checkpoint, and not where others are given; the run's own loss comes out to 1e-6."""
    summary = train(max_steps=2, max_length=24, src_length=9, save_strategy="steps", save_steps=2)
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        said: list[str] = []
        values = {"model_name_or_path": str(folder), "dataset_name_or_path": str(dataset)}
        record = evaluate_finished(values, None, said.append)
        assert record["eval_loss"] == pytest.approx(summary.eval_loss_after, abs=1e-6)
        assert record["eval_tokens"] == summary.data["dev"]["tokens"]
        assert f"src_length 9 and max_length 24, as in the run that wrote {folder}" in said
        other = evaluate_finished({**values, "max_length": 64}, None, said.append)
        assert f"src_length 9, as in the run that wrote {folder}" in said
        assert other["eval_tokens"] > record["eval_tokens"]
