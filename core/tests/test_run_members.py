"""What plugins see of a run: which members there are, and from which hook on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_plugins import toy

import sft
from sft import hookspecs
from sft.context import CoreRun, members

Train = Callable[..., sft.Summary]

HOOKS = [name for name in vars(hookspecs) if name.startswith("sft_")]
WITH_RUN = [name for name in HOOKS if "run" in inspect.signature(getattr(hookspecs, name)).parameters]
MEMBERS = {name: hook for name, (hook, _) in members().items()}


def recording(seen: dict[str, set[str]], hook: str) -> Callable[..., Any]:
    """A hook that writes down which members ``run`` has when it is called the first time."""

    def called(self: Any, run: sft.Run) -> Any:
        seen.setdefault(hook, {name for name in MEMBERS if hasattr(run, name)})
        return ANSWERS[hook](run) if hook in ANSWERS else None

    return called


def norms_train(run: sft.Run) -> None:
    for name, parameter in run.model.named_parameters():
        parameter.stop_gradient = "norm" not in name


def exported(run: sft.Run) -> sft.AdapterFiles:
    trained = {name: parameter.numpy() for name, parameter in run.model.named_parameters() if "norm" in name}
    return sft.AdapterFiles({"peft_type": "NORMS"}, trained)


ANSWERS: dict[str, Callable[[sft.Run], Any]] = {
    "sft_adapt_model": norms_train,
    "sft_export_adapter": exported,
    "sft_state": lambda run: {"kept": 1},
}


def test_each_hook_finds_the_members_that_its_page_promises(train: Train) -> None:
    """No fewer, and no more either: a member that is there by chance would be relied upon."""
    seen: dict[str, set[str]] = {}
    plugin = toy(**{hook: recording(seen, hook) for hook in WITH_RUN})
    settings = {"max_steps": 1, "evaluation_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    train("out", (plugin,), **settings, save_steps=1, load_best_model_at_end=True)
    assert set(seen) == {*WITH_RUN} - {"sft_run_failed"}
    order = [hook for hook in HOOKS if hook in seen]
    expected: set[str] = set()
    for hook in order:
        expected |= {name for name, since in MEMBERS.items() if since == hook}
        assert seen[hook] == expected, hook
    assert expected == set(MEMBERS)


def test_the_page_of_hooks_says_so() -> None:
    said = {}
    for hook in HOOKS:
        text = " ".join((inspect.getdoc(getattr(hookspecs, hook)) or "").split())
        match = re.search(r"From here on ``run`` has ((?:``\w+``(?:, | and )?)+)", text)
        said.update(dict.fromkeys(re.findall(r"``(\w+)``", match[1]), hook) if match else {})
    assert said == MEMBERS


def test_every_public_name_of_a_run_is_a_member() -> None:
    assert {name for name in dir(sft.Run) if not name.startswith("_")} == set(MEMBERS)


def test_what_the_core_keeps_is_not_on_a_plugins_run() -> None:
    own = set(CoreRun.__annotations__) | {name for name in vars(CoreRun) if not name.startswith("_")}
    assert own
    assert not own & set(dir(sft.Run))


@pytest.mark.parametrize(
    ("hook", "member", "since"),
    [
        ("sft_check", "source", "sft_model_config"),
        ("sft_model_config", "tokenizer", "sft_collator"),
        ("sft_collator", "strategy", "sft_quantizer"),
        ("sft_parallel_strategy", "model", "sft_adapt_model"),
    ],
)
def test_a_member_that_is_read_too_early_says_when_it_comes(
    train: Train, tmp_path: Path, hook: str, member: str, since: str
) -> None:
    plugin = toy(**{hook: lambda self, run: getattr(run, member)})
    with pytest.raises(sft.PluginError) as caught:
        train("out", (plugin,))
    text = (
        f"failed in {hook} (TooEarlyError: run.{member} does not exist yet: it does from {since} on); tell its author"
    )
    assert text in str(caught.value)
    assert isinstance(caught.value.__cause__, sft.TooEarlyError)
    assert "toy" in str(caught.value)
    assert not (tmp_path / "out").exists()
