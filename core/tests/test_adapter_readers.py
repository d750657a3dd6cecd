"""Which plugin reads an adapter folder: what its config says, and where that leaves several, the user."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click.testing
import pytest

import sft
from sft.inference.open import load_adapted, settings_for

Distribute = Callable[..., None]
MODEL = "llama-tied-gqa"

# Each says on the model, or of the merged weights, that it was the one who read.
READERS = """
    import sft

    class Reader(sft.Plugin):
        api_version = 1

        @sft.hookimpl
        def sft_import_adapter(self, model, folder):
            model.read_by = self.name
            return True

        @sft.hookimpl
        def sft_adapter_merger(self, folder):
            raise sft.UsageError(f"{self.name} merges")

    class Plain(Reader):
        name = "plain"

    class Spun(Reader):
        name = "spun"
        conflicts = ("plain",)

    class Other(Reader):
        name = "other"

    class Worn(sft.Plugin):
        name = "worn"
        api_version = 1
        requires = ("plain",)

    class Twice(sft.Plugin):
        name = "twice"
        api_version = 1
        requires = ("plain",)

        @sft.hookimpl(wrapper=True)
        def sft_import_adapter(self, model):
            found = yield
            model.read_by += ", and twice"
            return found

        @sft.hookimpl(wrapper=True)
        def sft_adapter_merger(self, folder):
            try:
                return (yield)
            except sft.UsageError as error:
                raise sft.UsageError(f"{error}, and twice") from error

    class Wrong(Twice):
        name = "wrong"
        api_version = 1

        @sft.hookimpl(wrapper=True)
        def sft_import_adapter(self):
            yield
"""


@pytest.fixture
def plain(distribute: Distribute) -> Distribute:
    """A plugin that reads every adapter of type YARN; gives ``distribute`` for more."""
    distribute("sft-test-plain", READERS, {"plain": "Plain"}, {"adapter.YARN": "Plain"})
    return distribute


@pytest.fixture
def spun(plain: Distribute) -> Distribute:
    """Beside it, one of another distribution that reads those that are spun."""
    plain("sft-test-spun", READERS, {"spun": "Spun"}, {"adapter.YARN.use_spin": "Spun"})
    return plain


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    def write(**config: Any) -> Path:
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "YARN", **config}))
        return tmp_path / "adapter"

    return write


def reader(folder: Path, *requested: str) -> str:
    """The plugin that answers to ``sft_import_adapter``."""
    _, active = settings_for(folder, requested)
    found = active.provider("sft_import_adapter")
    assert found is not None
    return found


def refusal(folder: Path, *requested: str) -> str:
    with pytest.raises(sft.UsageError) as caught:
        settings_for(folder, requested)
    return str(caught.value)


@pytest.mark.usefixtures("spun")
class TestByConfig:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [({}, "plain"), ({"use_spin": False}, "plain"), ({"use_spin": None}, "plain"), ({"use_spin": True}, "spun")],
    )
    def test_a_claim_that_says_more_goes_first(self, adapter: Any, config: dict[str, Any], expected: str) -> None:
        assert reader(adapter(**config)) == expected

    def test_a_value_may_be_claimed(self, adapter: Any, spun: Distribute) -> None:
        spun("sft-test-other", READERS, {"other": "Other"}, {"adapter.YARN.twist.Left": "Other"})
        assert reader(adapter(twist="left")) == "other"
        assert reader(adapter(twist="right")) == "plain"
        assert reader(adapter(twist=True)) == "plain"

    def test_the_user_decides_against_it(self, adapter: Any) -> None:
        folder = adapter(use_spin=True)
        assert reader(folder, "no:spun") == reader(folder, "plain") == "plain"
        assert reader(folder, "spun") == "spun"

    def test_a_plugin_that_does_not_read_it(self, adapter: Any) -> None:
        folder = adapter()
        assert refusal(folder, "spun") == (
            f"Plugin spun does not read {folder}, a YARN adapter (it reads YARN.use_spin); leave it out."
        )

    def test_all_that_read_it_are_left_out(self, adapter: Any) -> None:
        folder = adapter()
        assert refusal(folder, "no:plain") == (
            f"{folder} is a YARN adapter, and what reads it is left out; take away --plugin no:plain."
        )

    def test_a_type_that_nobody_reads(self, adapter: Any) -> None:
        assert "WOOL adapter, which no installed plugin reads (installed: " in refusal(adapter(peft_type="WOOL"))
        assert "YARN.use_spin" in refusal(adapter(peft_type="WOOL"))


def test_equals_are_left_to_the_user(plain: Distribute, adapter: Any) -> None:
    plain("sft-test-other", READERS, {"other": "Other"}, {"adapter.YARN": "Other"}, version="2.1")
    folder = adapter()
    assert refusal(folder) == (
        f"{folder} is a YARN adapter, which other (sft-test-other 2.1) and plain (sft-test-plain 1.0) read; choose "
        "with --plugin other or --plugin plain, or leave others out with --plugin no:NAME."
    )
    assert reader(folder, "other") == reader(folder, "no:plain") == "other"
    assert reader(folder, "plain") == reader(folder, "no:other") == "plain"


def test_a_refinement_brings_what_it_refines(plain: Distribute, adapter: Any) -> None:
    plain("sft-test-worn", READERS, {"worn": "Worn"}, {"adapter.YARN.worn": "Worn"})
    assert set(settings_for(adapter(worn=True))[1].readers) == {"plain", "worn"}
    assert settings_for(adapter())[1].readers == ["plain"]
    folder = adapter(worn=True)
    assert refusal(folder, "no:plain") == (
        f"Plugin worn reads {folder} and refines plain, which no:plain leaves out; take that away."
    )


def test_one_that_wraps_anothers_answers(plain: Distribute, adapter: Any) -> None:
    """It is no second provider, sees what the reader made of a folder, and answers for itself where it is wrong."""
    plain("sft-test-twice", READERS, {"twice": "Twice"}, {"adapter.YARN.twice": "Twice"})
    plain("sft-test-wrong", READERS, {"wrong": "Wrong"}, {"adapter.YARN.wrong": "Wrong"})
    folder, model = adapter(twice=True), SimpleNamespace()
    active = settings_for(folder)[1]
    assert active.readers == ["plain", "twice"]
    assert active.provider("sft_import_adapter") == "plain"
    assert active.hook.sft_import_adapter(model=model, folder=folder, hook=active.hook) is True
    assert model.read_by == "plain, and twice"
    with pytest.raises(sft.UsageError, match=r"^plain merges, and twice$"):
        active.hook.sft_adapter_merger(folder=folder, hook=active.hook)
    wrong = settings_for(adapter(wrong=True))[1]
    with pytest.raises(sft.PluginError, match=r"Plugin wrong .* answers sft_import_adapter with nothing where a bool"):
        wrong.hook.sft_import_adapter(model=model, folder=folder, hook=wrong.hook)


def test_a_plugin_that_claims_other_adapters_need_not_work(plain: Distribute, adapter: Any) -> None:
    plain("sft-test-broken", "raise RuntimeError('imported')", {"broken": "B"}, {"adapter.YARN.use_spin": "B"})
    assert reader(adapter()) == "plain"
    assert "Plugin broken of sft-test-broken 1.0 cannot be imported" in refusal(adapter(use_spin=True))


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("generate", ["--prompt", "x", "--max_new_tokens", "1"]),
        ("chat", ["--max_new_tokens", "1"]),
        ("evaluate", ["--per_device_eval_batch_size", "4"]),
        ("merge", []),
    ],
)
@pytest.mark.parametrize(("requested", "expected"), [([], "spun"), (["no:spun"], "plain"), (["plain"], "plain")])
def test_every_command_that_opens_an_adapter(
    paddle: Any, spun: Distribute, adapter: Any, models: Path, dataset: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, command: str, arguments: list[str], requested: list[str], expected: str,
) -> None:  # fmt: skip
    """``--plugin`` decides, and whoever it names is no plugin without a part."""
    said: list[str] = []
    load = load_adapted

    def watched(*args: Any) -> Any:
        model = load(*args)
        said.append(model.read_by)
        return model

    for name in ("open", "evaluate"):
        monkeypatch.setattr(f"sft.inference.{name}.load_adapted", watched)
    more = {"evaluate": ["--dataset_name_or_path", str(dataset)], "merge": ["--output_path", str(tmp_path / "merged")]}
    line = ["--model_name_or_path", str(models / MODEL), "--lora_path", str(adapter(use_spin=True)), *arguments]
    line += [*more.get(command, []), *(word for name in requested for word in ("--plugin", name))]
    try:
        click.testing.CliRunner().invoke(
            import_module(f"sft.commands.{command}").command, line, input="", standalone_mode=False,
            catch_exceptions=False,
        )  # fmt: skip
    except sft.UsageError as error:
        said.append(str(error).removesuffix(" merges"))
    assert said == [expected]


def test_claims_are_listed(spun: Distribute, sft_command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    rows = map(json.loads, sft_command("plugins", "--json").stdout.splitlines())
    found = {row["name"]: row["also_requested_by"] for row in rows}
    assert (found["plain"], found["spun"]) == (["adapter YARN"], ["adapter YARN.use_spin"])
