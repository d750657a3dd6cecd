"""Numbers near 0 are what somebody wrote, whether or not the thread that reads them takes denormals as zero."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sft
from sft import runtime
from sft.models.families.values import Values
from sft.options import convert, options_of
from sft.settings.files import read_file
from sft.small_files import read_object
from sft.written_numbers import read_number

TINY = ["1e-320", "-1e-320", "1e-400", "-1E-400", "2e-308", "0." + "0" * 330 + "1", "1_0e-330", "٣e-320"]
OTHERS = ["0", "0.0", "-0.0", "0e5", "0e-400", "٠", "2.3e-308", "-1e-300", "1e-5", "inf", "-inf", "1e400"]


@pytest.fixture(params=[False, True], ids=["denormals kept", "denormals are zero"])
def said(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], Any]:
    """What a call gives, an error as its text, in a thread that takes denormals as zero, or one that does not."""

    def call(function: Callable[[], Any]) -> Any:
        found = []

        def run() -> None:
            libm, control = runtime._control()
            if libm is not None:  # else they are always kept
                control[7] = control[7] | runtime._FLUSH if request.param else control[7] & ~runtime._FLUSH
                assert libm.fesetenv(control) == 0
                assert runtime.flushes_denormals() == request.param
            try:
                found.append(function())
            except sft.UsageError as error:
                found.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    return call


@pytest.mark.parametrize("text", TINY)
def test_what_is_too_small_is_no_0_and_shows_as_it_was_written(said: Any, text: str) -> None:
    negative = text.startswith("-")
    number = said(lambda: read_number(text))
    signs = said(lambda: (number > 0, number < 0, number == 0, abs(number) < 2.3e-308))
    assert signs == (not negative, negative, False, True)
    for one in (number, copy.deepcopy(number), pickle.loads(pickle.dumps(number))):
        assert said(lambda one=one: (repr(one), f"{one}")) == (repr(number), repr(number))
    assert repr(number) == (text if len(text) <= 40 else f"{text[:40]}…")
    assert float(json.dumps(number)) == number


@pytest.mark.parametrize("text", OTHERS)
def test_all_others_are_as_python_reads_them(said: Any, text: str) -> None:
    number = said(lambda: read_number(text))
    assert type(number) is float
    assert repr(number) == repr(float(text))


def test_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        read_number("e-5")


def test_it_is_refused_from_every_file(said: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eps": 1e-320, "factors": [-1e-400], "scale": 0.0}')
    values = said(lambda: read_object(tmp_path / "config.json"))
    assert said(lambda: repr(values)) == "{'eps': 1e-320, 'factors': [-1e-400], 'scale': 0.0}"
    config = Values(values, "here")
    expected = "here: config.json must give eps as a number from 1.2e-38 to 3.4e+38, which is what float32 holds, not "
    assert said(lambda: config.number("eps", 1.0)) == f"{expected}1e-320."
    assert said(lambda: config.optional("eps")) == f"{expected}1e-320."
    assert (
        said(lambda: config.number("scale", 1.0)) == "here: config.json must give scale as a number above 0, not 0.0."
    )


@dataclass
class Options:
    scale: float = sft.option(1.0, "a factor", minimum=0)
    share: float = sft.option(1.0, "a share", above=0, maximum=1)


@pytest.mark.parametrize("name", ["scale", "share"])
@pytest.mark.parametrize("kind", ["json", "yaml", "typed"])
def test_a_setting_is_not_taken_for_0(said: Any, tmp_path: Path, name: str, kind: str) -> None:
    declared = options_of(Options)[name]
    path = tmp_path / f"s.{kind}"
    path.write_text(f'{{"{name}": 1.0e-320}}' if kind == "json" else f"{name}: 1.0e-320\n")
    text = said(lambda: convert(declared, "1.0e-320" if kind == "typed" else read_file(path)[name]))
    got = "'1.0e-320'" if kind == "typed" else "1.0e-320"
    assert text == (
        f"{name}: numbers here are 0 or from 1.2e-38 to 3.4e+38 in size, which is what 32 bits hold, got {got}."
    )
