"""Photograph the report of a real run for the README and docs/report.md: docs/images/report.png and report-dark.png.

It needs chromium and its driver (tests/browser/driver.py), trains the demo's model for two minutes, and is run by hand:
what a browser draws differs from machine to machine in single pixels, so nothing compares it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

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


def main() -> int:
    reason = missing()
    if reason is not None:
        print(reason)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "ads-lora"
        sft.run({**SETTINGS, "output_dir": str(folder)})
        browser = Browser()
        try:
            for scheme, picture in (("light", "report.png"), ("dark", "report-dark.png")):
                browser.open(folder / "report.html", "laptop", scheme)
                browser.point("figure[data-chart=loss] .u-over", 0.45)
                browser.evaluate("scrollTo(0, 0)")
                browser.picture(IMAGES / picture, high=1010)
        finally:
            browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
