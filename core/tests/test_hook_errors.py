"""A hook that fails or answers wrongly: plugin, distribution and hook are named, and the author sees where."""

from __future__ import annotations

import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_plugins import Publisher, active, raising, toy

import sft
from sft import hookspecs
from sft.plugins.registry import Plugins

Train = Callable[..., sft.Summary]
Distribute = Callable[..., None]
HOOKS = [name for name in vars(hookspecs) if name.startswith("sft_")]
WHO = "Plugin toy (given directly as Toy)"


def call(plugins: Plugins, hook: str) -> Any:
    spec = getattr(hookspecs, hook)
    names = spec.__code__.co_varnames[: spec.__code__.co_argcount]
    return getattr(plugins.hook, hook)(**dict.fromkeys(names))


# --- exceptions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_an_exception_names_plugin_distribution_and_hook(hook: str) -> None:
    error = KeyError("a\nbug")
    with pytest.raises(sft.PluginError) as caught:
        call(active(extra=(toy(**{hook: raising(error)}),)), hook)
    assert str(caught.value) == (
        f"{WHO} failed in {hook} (KeyError: 'a\\nbug'); tell its author, or leave the plugin out."
    )
    assert caught.value.__cause__ is error
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_what_the_machine_may_be_to_blame_for(error: Exception) -> None:
    with pytest.raises(sft.PluginError, match="; if the machine is not to blame, tell its author, or leave"):
        call(active(extra=(toy(sft_check=raising(error)),)), "sft_check")


def test_the_cause_begins_in_the_plugins_own_function() -> None:
    plugins = active(extra=(toy(sft_check=raising(ZeroDivisionError())),))
    with pytest.raises(sft.PluginError) as caught:
        call(plugins, "sft_check")
    assert caught.value.__cause__ is not None
    assert [frame.name for frame in traceback.extract_tb(caught.value.__cause__.__traceback__)] == ["fails"]
    details = caught.value.details()
    assert details.startswith("Traceback (most recent call last):\n")
    assert details.count("  File ") == 1
    assert details.endswith("ZeroDivisionError\n")


@pytest.mark.parametrize(
    "error",
    [sft.UsageError("do this"), sft.SftError("that"), sft.PluginError("of another"), KeyboardInterrupt()],
)
def test_what_passes_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        call(active(extra=(toy(sft_check=raising(error)),)), "sft_check")
    assert caught.value is error


def test_an_exit_is_an_error_of_the_plugin() -> None:
    """It would end the run without a word, and with 0 as success does."""
    for hook in HOOKS:
        if hook != "sft_launch":
            with pytest.raises(sft.PluginError) as caught:
                call(active(extra=(toy(**{hook: raising(SystemExit(0))}),)), hook)
            assert str(caught.value).startswith(f"{WHO} failed in {hook} (SystemExit: 0); tell its author")
    with pytest.raises(SystemExit):  # told to end from outside, it passes that on
        call(active(extra=(toy(sft_launch=raising(SystemExit(143))),)), "sft_launch")


def test_a_plugin_that_cannot_be_made() -> None:
    class Toy(toy()):  # type: ignore[misc]
        api_version = 1

        def __init__(self, options: Any) -> None:
            raise KeyError("a bug")

    Toy.__qualname__ = "Toy"
    with pytest.raises(sft.PluginError) as caught:
        active(extra=(Toy,))
    assert str(caught.value).startswith(f"{WHO} failed in its __init__ (KeyError: 'a bug'); tell its author")
    assert caught.value.details().count("  File ") == 1


def test_a_published_hook_too() -> None:
    class Asking(Publisher):
        api_version = 1

        @sft.hookimpl
        def sft_adapt_model(self, run: Any, model: Any) -> None:
            run(rank=2)

    plugins = active(extra=(Asking, toy(base_factor=lambda self, rank: 1 / 0)))
    with pytest.raises(sft.PluginError, match=r"^Plugin toy .* failed in base_factor \(ZeroDivisionError: "):
        plugins.hook.sft_adapt_model(run=plugins.hook.base_factor, model=None)
    plugins = active(extra=(Asking, toy(base_factor=lambda self, rank: "much")))
    with pytest.raises(sft.PluginError) as caught:
        plugins.hook.base_factor(rank=2)
    assert str(caught.value) == (
        f"{WHO} answers base_factor with a str ('much') where a number is expected; correct it there, or leave the "
        "plugin out."
    )
    for fine in (2, 0.5, np.float32(2)):
        assert active(extra=(Asking, toy(base_factor=lambda self: fine))).hook.base_factor(rank=2) == fine  # noqa: B023


def test_one_that_is_asked_alone() -> None:
    plugins = active(extra=(toy(sft_state=raising(KeyError("a bug"))),))
    for _ in range(2):  # the second time, the caller is there already
        with pytest.raises(sft.PluginError, match="failed in sft_state"):
            plugins.ask("toy", "sft_state", run=None)


def test_a_wrapper() -> None:
    def around(self: Any) -> Iterator[None]:
        yield
        raise KeyError("a bug")

    class Wraps(sft.Plugin):
        name = "toy"
        api_version = 1
        sft_check = sft.hookimpl(wrapper=True)(around)

    with pytest.raises(sft.PluginError, match=r"^Plugin toy .* failed in sft_check \(KeyError: 'a bug'\)"):
        call(active(extra=(Wraps,)), "sft_check")


def test_a_run_ends_with_it(train: Train) -> None:
    error = RuntimeError("a bug")
    with pytest.raises(sft.PluginError, match="failed in sft_step_ended") as caught:
        train("out", (toy(sft_step_ended=raising(error)),))
    assert caught.value.__cause__ is error


def test_a_member_that_no_run_has_is_a_bug_of_the_plugin(train: Train) -> None:
    with pytest.raises(sft.PluginError, match=r"\(AttributeError: 'CoreRun' object has no attribute 'modell'\)"):
        train("out", (toy(sft_check=lambda self, run: run.modell),))


def test_a_broken_reader_of_records_is_no_error_of_the_data(train: Train, dataset: Path) -> None:
    with pytest.raises(sft.PluginError) as caught:
        train("out", (toy(sft_record_format=lambda self, record: record["question"]),))
    assert str(caught.value) == (
        f"{WHO} failed in sft_record_format (KeyError: 'question'); tell its author, or leave the plugin out. It was "
        f"reading {dataset / 'train.json'}, line 1."
    )
    with pytest.raises(sft.UsageError, match=r"train.json, line 1: no good\.$"):
        train("out", (toy(sft_record_format=raising(ValueError("no good."))),))


BROKEN = """
    import sft

    class Tool(sft.Plugin):
        name = "tool"
        api_version = 1

        @sft.hookimpl
        def sft_check(self, run):
            self.look(run)

        def look(self, run):
            return run.given["nothing_like_it"]
"""


def test_the_command_line_shows_the_plugins_lines_and_one_sentence(
    distribute: Distribute, sft_command: Callable[..., subprocess.CompletedProcess[str]], site: Path, dataset: Path
) -> None:
    distribute("sft-test-tool", BROKEN, {"tool": "Tool"}, version="2.3")
    places = ("--model_name_or_path", "m", "--dataset_name_or_path", str(dataset), "--output_dir", str(site / "out"))
    done = sft_command("run", "--plugin", "tool", *places)
    assert (done.returncode, done.stdout) == (1, "")
    first, *middle, last = done.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert [line.rpartition(" in ")[2] for line in middle if line.startswith("  File ")] == ["sft_check", "look"]
    assert last == (
        "sft: Plugin tool (sft-test-tool 2.3) failed in sft_check (KeyError: 'nothing_like_it'); tell its author, or "
        "leave the plugin out."
    )


# --- wrong answers ------------------------------------------------------------------------------------------


class Packs:
    packs = False

    def rows(self, lengths: Any, rng: Any) -> list[tuple[int, ...]]:
        return []


def complaint(hook: str, given: Any) -> str:
    with pytest.raises(sft.PluginError) as caught:
        call(active(extra=(toy(**{hook: lambda self: given}),)), hook)
    message = str(caught.value)
    head, tail = f"{WHO} answers {hook} with ", "; correct it there, or leave the plugin out."
    assert message.startswith(head)
    assert message.endswith(tail)
    return message.removeprefix(head).removesuffix(tail)


@pytest.mark.parametrize(
    ("hook", "given", "what"),
    [
        ("sft_state", [1], "a list where a dict is expected"),
        ("sft_state", {1: 2}, "a dict with the key an int (1) where a str is expected"),
        (
            "sft_collator",
            Packs(),
            "a Packs where a DataCollator (sft.DataCollator) is expected, and it has no batch",
        ),
        ("sft_collator", Packs, "the class Packs where an instance of it is expected"),
        ("sft_quantizer", 3, "an int (3) where a Quantizer (sft.Quantizer) is expected, and it has no quantize"),
        (
            "sft_attention_backend",
            len,
            "a builtin_function_or_method where an AttentionBackend (sft.AttentionBackend) is expected, and it has no "
            "mask",
        ),
        ("sft_export_adapter", {"config": {}}, "a dict where an AdapterFiles is expected"),
        ("sft_export_adapter", None, "nothing where an AdapterFiles is expected"),
        (
            "sft_export_adapter",
            sft.AdapterFiles({}, {"a": [1.0]}),  # type: ignore[dict-item]
            "an AdapterFiles whose tensors is a dict whose 'a' is a list where an ndarray is expected",
        ),
        ("sft_record_format", "user", "a str ('user') where a list is expected"),
        ("sft_record_format", [("user", "hello")], "a list with a tuple where a Turn is expected"),
        (
            "sft_record_format",
            [sft.Turn("user", 3)],  # type: ignore[arg-type]
            "a list with a Turn whose content is an int (3) where a str is expected",
        ),
        (
            "sft_adapter_merger",
            object(),
            "an object where an AdapterMerger (sft.AdapterMerger) is expected, and it has no merge, unused",
        ),
        ("sft_adapter_merger", None, "nothing where an AdapterMerger (sft.AdapterMerger) is expected, and it has no"),
        ("sft_import_adapter", False, "False where True is expected"),
        ("sft_import_adapter", None, "nothing where a bool is expected"),
        ("sft_launch", 0, "an int (0) where a Summary is expected"),
        ("sft_model_config", {}, "a dict where nothing is expected"),
        ("sft_check", True, "a bool (True) where nothing is expected"),
    ],
)
def test_a_wrong_answer_says_what_came_and_what_is_expected(hook: str, given: Any, what: str) -> None:
    assert complaint(hook, given).startswith(what)


def test_a_parallel_strategy_must_be_one() -> None:
    assert complaint("sft_parallel_strategy", "many").startswith("a str ('many') where a ParallelStrategy (sft.")


@pytest.mark.parametrize(
    ("hook", "given"),
    [
        ("sft_state", {"count": 3, "array": np.zeros(2)}),
        ("sft_record_format", [sft.Turn("user", "a"), sft.Turn("assistant", "b", trains=True)]),
        ("sft_export_adapter", sft.AdapterFiles({"r": 1}, {"a": np.zeros(1)})),
        ("sft_import_adapter", True),
        *(
            (hook, None)
            for hook in ("sft_collator", "sft_quantizer", "sft_launch", "sft_attention_backend", "sft_kernels")
        ),
    ],
)
def test_right_answers(hook: str, given: Any) -> None:
    found = call(active(extra=(toy(**{hook: lambda self: given}),)), hook)
    assert found in (given, [given])


def test_a_wrong_answer_ends_a_run_before_it_trains(train: Train) -> None:
    with pytest.raises(sft.PluginError, match="answers sft_collator with a list where a DataCollator"):
        train("out", (toy(sft_collator=lambda self: []),))


ROUND: list[Any] = []
ROUND.append({"again": ROUND})


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"deep": [1, {2, 3}]}, "a set"),
        (np.int64(3), "an int64"),
        ((1, 2), "a tuple"),
        ({"deep": {3: 4}}, "the key 3"),
        (np.array(["text"]), "an array of <U4"),
        ([np.zeros(2)], "an array in a list"),
        ({"deep": np.zeros(2)}, "an array in a dict"),
        (Path("x"), "a PosixPath"),
        (ROUND, "a list that holds itself"),
        (["half \ud83d of a pair"], "text that is not Unicode ('half \\ud83d of a pair')"),
        ({"\ud83d": 1}, "the key '\\ud83d'"),
        (np.zeros(2, np.longdouble), f"an array of {np.dtype(np.longdouble)}"),
    ],
)
def test_state_that_cannot_be_kept_is_found_before_the_first_step(
    train: Train, tmp_path: Path, value: Any, what: str
) -> None:
    steps: list[int] = []
    watches = toy(sft_state=lambda self: {"fine": 1, "count": value}, sft_step_ended=lambda self: steps.append(1))
    with pytest.raises(sft.PluginError) as caught:
        train("out", (watches,), save_strategy="epoch", do_eval=False)
    assert str(caught.value) == (
        f"{WHO} answers sft_state with {what} under 'count', which a checkpoint cannot keep; give JSON values and "
        "numpy arrays, or leave the plugin out."
    )
    assert not steps
    train("other", (watches,), max_steps=1, do_eval=False)  # nothing is to be kept
    assert steps == [1]


def test_run_json_holds_what_a_plugin_says_or_the_plugin_is_named() -> None:
    from types import SimpleNamespace

    from sft.training.report import _of_plugins

    def said(given: Any) -> dict[str, Any]:
        return _of_plugins(SimpleNamespace(plugins=active(extra=(toy(sft_run_record=lambda self: given),))))  # type: ignore[arg-type]

    assert said({"job": 4711}) == {"toy": {"job": 4711}}
    assert said({}) == {}
    for given in ({"a": {1, 2}}, {"b": float("nan")}):
        with pytest.raises(sft.PluginError, match=r"answers sft_run_record with what run\.json cannot hold \("):
            said(given)
