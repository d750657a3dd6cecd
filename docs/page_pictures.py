"""Photograph a real run for the README, docs/report.md and docs/board.md: its board while it trains, and its report:
docs/images/board.png and report.png, each with a dark one.

It needs chromium and its driver (tests/browser/driver.py), trains the demo's model for two minutes, and is run by hand:
what a browser draws differs from machine to machine in single pixels, so nothing compares it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser.boards import board_of, until  # noqa: E402
from browser.driver import Browser, missing  # noqa: E402

import sft  # noqa: E402

DEMO = Path(sft.__file__).parent / "demo"
IMAGES = ROOT / "docs" / "images"
SETTINGS = {
    "plugin": ["lora", "greedy-zero-padding"],
    "model_name_or_path": str(DEMO / "model"),
    "dataset_name_or_path": str(DEMO / "data"),
    "run_name": "ads-lora",
    "max_length": 256,
    "max_steps": 160,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "logging_steps": 2,
    "evaluation_strategy": "steps",
    "eval_steps": 20,
    "num_samples": 4,
    "max_new_tokens": 60,
    "seed": 1,
}

BOARD_AT = 100
"""The step after which the board is photographed."""


def main() -> int:
    reason = missing()
    if reason is not None:
        print(reason)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "ads-lora"
        browser = Browser()
        try:
            sft.run({**SETTINGS, "output_dir": str(folder)}, plugins=[photographer(browser, folder.parent)])
            for scheme, picture in (("light", "report.png"), ("dark", "report-dark.png")):
                browser.open(folder / "report.html", "laptop", scheme)
                browser.evaluate("document.querySelector('figure[data-chart=loss] .plot').focus({focusVisible: false})")
                browser.press(*["ArrowRight"] * 30)
                browser.evaluate("scrollTo(0, 0)")
                browser.picture(IMAGES / picture, high=1010)
        finally:
            browser.close()
    return 0


def photographer(browser: Browser, folder: Path) -> type[sft.Plugin]:
    """A plugin that lets a run wait while its board is photographed."""

    class Photographer(sft.Plugin):
        name = "photographer"
        api_version = 1

        @sft.hookimpl
        def sft_step_ended(self, run: sft.Run, record: dict[str, Any]) -> None:
            if record["step"] != BOARD_AT:
                return
            with board_of(folder) as address:
                for scheme, picture in (("light", "board.png"), ("dark", "board-dark.png")):
                    browser.open("about:blank")
                    browser.open(address, "laptop", scheme)
                    until(lambda: browser.evaluate("return document.querySelectorAll('figure canvas').length > 5"))
                    browser.picture(IMAGES / picture, high=1010)

    return Photographer


if __name__ == "__main__":
    sys.exit(main())
