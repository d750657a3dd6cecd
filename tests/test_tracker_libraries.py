"""The libraries of trackers, in an environment of their own: they want another protobuf than paddlenlp leaves."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from environments import PIP, done

ROOT = Path(__file__).parents[1]
LIBRARIES = ("tensorboard", "visualdl", "wandb", "mlflow-skinny", "swanlab")  # skinny: without servers


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_library_keeps_what_a_run_tells_it(tmp_path: Path) -> None:
    """The newest that pip finds, over what is installed here. What a library then keeps is what its own tests say."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (own,) = tmp_path.glob("venv/lib/python*/site-packages")
    here = sysconfig.get_path("purelib")
    (own / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n", encoding="utf-8")
    line = [*PIP, "--python", str(python), "install", "--quiet", *LIBRARIES]
    done(subprocess.run(line, capture_output=True, text=True, timeout=800))
    tests = [str(python), "-m", "pytest", "plugins/track/tests/test_libraries.py", "-m", "slow", "-q"]
    ended = subprocess.run(tests, capture_output=True, text=True, timeout=400, cwd=ROOT)
    said = done(ended)
    assert f"{len(LIBRARIES)} passed" in said
    assert "skipped" not in said
