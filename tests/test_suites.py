"""``sft.testing.suite`` catches what it is for: plugins of the templates, each broken in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from installing import install

import sft
from sft import suites
from sft.kit.new import write_package
from sft.plugins.discovery import entries
from sft.testing import suite

pytestmark = pytest.mark.slow

Train = Callable[..., sft.Summary]
Broken = Callable[[str, str, str], str]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Install a kind's template with ``old`` replaced by ``new``; the plugin's name."""

    def make(kind: str, old: str, new: str) -> str:
        made = len([*tmp_path.glob("package*")])
        name = f"broken-{abs(hash((kind, old, new, str(tmp_path))))}-{made}"
        folder, site = write_package(name, kind, tmp_path / f"package{made}"), tmp_path / f"site{made}"
        source = folder / "src" / f"sft_{name.replace('-', '_')}.py"
        text = source.read_text(encoding="utf-8")
        assert old in text
        source.write_text(text.replace(old, new), encoding="utf-8")
        site.mkdir()
        install(folder, site)
        monkeypatch.syspath_prepend(site)
        entries.cache_clear()
        return name

    return make


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", None),
        ("scale.set_value(scale)", "scale.set_value(scale * 0 + 1)", "something else when it is read again"),
        ("return weight * (scale", "return weight / (scale", "A merged adapter of .* computes something else"),
        ('"target_modules": sft', '"targets": sft', "has no target_modules"),
        ("y * self.scale.astype(y.dtype)", "y", "has learned nothing"),
    ],
)
def test_an_adapter(broken: Broken, train: Train, base_model: Path, old: str, new: str, message: str | None) -> None:
    name = broken("adapter", old, new) if old else broken("adapter", "import", "import")
    if message is None:
        suites.check_reloads(train, base_model, name, plugin=[name], learning_rate=1e-1)
        return
    with pytest.raises((AssertionError, sft.SftError), match=message):
        suites.check_reloads(train, base_model, name, plugin=[name], learning_rate=1e-1)


def test_what_a_checkpoint_does_not_have(broken: Broken, train: Train) -> None:
    """A running mean beside the optimizer's state, which a resumed run begins anew."""
    beside = 'self.__dict__.setdefault("own", {}).setdefault(name, paddle.zeros_like(self.values[name]))'
    name = broken("optimizer", 'self.kept[name]["mean"]', beside)
    with pytest.raises(AssertionError, match=r"resumed run measures|has learned another"):
        suites.check_resumes(train, plugin=[name])


def test_an_observer_that_changes_what_is_learned(broken: Broken, train: Train) -> None:
    old = "    def sft_step_ended(self, run: Run, record: dict[str, Any]) -> None:\n"
    touch = "        first = next(iter(run.model.parameters()))\n        first.set_value(first * 0.5)\n"
    name = broken("tracker", old, old + touch)
    with pytest.raises(AssertionError, match=r"a run measures other numbers|has learned another"):
        suites.check_changes_nothing(train, name, plugin=[name])


def test_a_declaration_that_does_not_hold(broken: Broken) -> None:
    name = broken("tracker", "sft.option(", "sft.option(help='', default=None) if True else sft.option(")
    with pytest.raises(AssertionError, match="has no help"):
        suites.check_declared(name)


def test_a_suite_has_the_tests_of_the_kind(broken: Broken) -> None:
    def tests(kind: str) -> set[str]:
        return {name for name in dir(suite(broken(kind, "import", "import"))) if name.startswith("test_")}

    of_all = {"test_what_it_declares_holds", "test_a_run_that_stops_and_goes_on_is_the_same"}
    assert tests("collator") == of_all
    assert tests("adapter") == {*of_all, "test_what_is_read_or_merged_computes_what_was_trained"}
    assert tests("tracker") == {*of_all, "test_it_changes_nothing"}
