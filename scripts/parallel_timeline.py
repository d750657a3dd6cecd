"""What two ranks do in a step, as a picture: docs/images/parallel-timeline.svg and what it was drawn from, beside it.

    python scripts/parallel_timeline.py          trains a small model on two CPU processes, and draws
    python scripts/parallel_timeline.py --draw   draws again what was recorded

Ranks are those of the parallel plugin's tests, whose process groups note when a collective leaves and when all of it
has come. Times are of a CPU and of sockets: the order is what the picture shows, not speed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUPPORT = ROOT / "plugins/parallel_4d/tests/support"
PICTURE = ROOT / "docs/images/parallel-timeline.svg"
PLANS = {"stage1": {"sharding": "stage1"}, "stage3": {"sharding": "stage3", "recompute": True}}
BUCKET = 1 << 20
COLOURS = {"forward": "#7aa6d8", "loss": "#b7a6d8", "backward": "#e3a857", "reduce_scatter": "#5b9f6f"}
COLOURS |= {"all_gather": "#c46a7a"}
WIDTH, BAR, LEFT = 960, 16, 150
WORDS = {"reduce_scatter": "reduce-scatter", "all_gather": "all-gather"}


def record() -> dict[str, Any]:
    """The events of a step under each plan, of both ranks."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(SUPPORT)]
    from processes import run_ranks

    from sft.testing import make_model, write_data

    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "data").mkdir()
        model = make_model(
            folder / "model", num_hidden_layers=4, hidden_size=256, intermediate_size=1024, num_attention_heads=4,
            num_key_value_heads=4,
        )  # fmt: skip
        records = [{"src": "say the number " * 12, "tgt": "0 1 2 3 4 5 6 7 " * 4} for _ in range(16)]
        data = write_data(folder / "data", records, records[:2])
        for name, settings in PLANS.items():
            values = {
                "model_name_or_path": str(model), "dataset_name_or_path": str(data), "output_dir": str(folder / name),
                "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 128,
                "do_eval": False, "evaluation_strategy": "no", "disable_tqdm": True, "seed": 1, **settings,
            }  # fmt: skip
            ranks = run_ranks(2, "recording:record", values, BUCKET, timeout=100)
            found[name] = [[e for e in rank.value["events"] if e["step"] == 2] for rank in ranks]
    return found


def lanes(events: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """What a rank computes, and what is under way meanwhile: gradients, and values."""
    computes = [event for event in events if event["what"] in ("forward", "loss", "backward")]
    sends = [event for event in events if event.get("bytes", 0) > 64]
    return [
        ("computes", computes),
        ("gradients", [event for event in sends if event["what"] == "reduce_scatter"]),
        ("values", [event for event in sends if event["what"] == "all_gather"]),
    ]


def drawn(found: dict[str, list[list[dict[str, Any]]]]) -> str:
    """The picture: a block a plan, in it three lanes a rank."""
    parts, top = [], 10
    for plan, ranks in found.items():
        begin = min(event["began"] for events in ranks for _, lane in lanes(events) for event in lane)
        end = max(
            event.get("waited", event["ended"]) for events in ranks for _, lane in lanes(events) for event in lane
        )
        scale = (WIDTH - LEFT - 20) / (end - begin)
        title = "sharding " + plan + (", recompute" if PLANS[plan].get("recompute") else "")
        parts.append(f'<text x="10" y="{top + 14}" class="plan">{title}: {1000 * (end - begin):.0f} ms</text>')
        top += 24
        for rank, events in enumerate(ranks):
            for name, lane in lanes(events):
                parts.append(f'<text x="20" y="{top + 12}">rank {rank} {name}</text>')
                parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{top + 17.5}" y2="{top + 17.5}" class="line"/>')
                for event in lane:
                    x, width = LEFT + scale * (event["began"] - begin), scale * (event["ended"] - event["began"])
                    told = WORDS.get(event["what"], event["what"])
                    told += f", {event['bytes']:,} bytes" if "bytes" in event else ""
                    told += f", {1000 * (event['ended'] - event['began']):.1f} ms"
                    parts.append(
                        f'<rect x="{x:.1f}" y="{top}" width="{max(width, 1.5):.1f}" height="{BAR}" '
                        f'fill="{COLOURS[event["what"]]}"><title>{told}</title></rect>'
                    )
                top += 20
            top += 6
        top += 10
    for number, what in enumerate(("forward", "loss", "backward", "reduce_scatter", "all_gather")):
        x = LEFT + 130 * number
        parts.append(f'<rect x="{x}" y="{top}" width="{BAR}" height="{BAR}" fill="{COLOURS[what]}"/>')
        parts.append(f'<text x="{x + 22}" y="{top + 12}">{WORDS.get(what, what)}</text>')
    style = "text{font:12px sans-serif;fill:#333}.plan{font-weight:bold}.line{stroke:#ddd}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 30}" role="img" '
        'aria-label="What two ranks compute and send in a step">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>' + "\n".join(parts) + "</svg>\n"
    )


def main() -> None:
    data = PICTURE.with_suffix(".json")
    if "--draw" not in sys.argv:
        PICTURE.parent.mkdir(exist_ok=True)
        data.write_text(json.dumps(record()) + "\n", encoding="utf-8")
    PICTURE.write_text(drawn(json.loads(data.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
