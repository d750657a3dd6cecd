"""How many bad records `sft blame` finds, and with how many replays: what docs/replay.md says of it.

    python scripts/planted_records.py FOLDER [--records 5000] [--planted 50] [--batch_size 8] [--plugin NAME ...]

Writes records of the demo's kind (``scripts/make_demo``) into FOLDER, with bad ones in places that are drawn: answers
to other products, answers in other languages, answers whose UTF-8 was read as Latin-1, and answers that repeat
themselves without end. Trains the demo's model on them for one pass, by the command line, with a checkpoint every 25
steps; and lets `sft blame --json` name records. A bad record is found if it is named. Prints a table of how many are,
in the steps that stand out most. A run that FOLDER holds already is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "core" / "src" / "sft" / "demo"
MOST = (10, 25, 50, 75, 100)
SAVED = 25
"""Steps between checkpoints."""
FOREIGN = (
    "Dieser Artikel überzeugt durch weiche Wolle, schöne Knöpfe und einen geraden Schnitt für jeden Tag.",
    "Cette pièce élégante séduit par sa matière légère, ses détails brodés et sa coupe très féminine.",
    "Este modelo cómodo y ligero combina con todo y te acompaña de la mañana a la noche.",
    "Ta lekka i ciepła rzecz pasuje na każdą okazję, a drobne guziki dodają jej uroku.",
)
LIKE = "“Café” weather — cozy, naïve, très chic: “über‑soft” wool… at €20 it’s a façade of déjà vu."


def shuffled(draw: Random, lines: list[dict[str, str]], at: int) -> str:
    return draw.choice([line["tgt"] for number, line in enumerate(lines) if number != at])


def foreign(draw: Random, lines: list[dict[str, str]], at: int) -> str:
    return draw.choice(FOREIGN)


def mojibake(draw: Random, lines: list[dict[str, str]], at: int) -> str:
    return f"{lines[at]['tgt']} {LIKE}".encode().decode("latin-1")


def endless(draw: Random, lines: list[dict[str, str]], at: int) -> str:
    words = lines[at]["tgt"].split()
    start = draw.randrange(len(words) - 3)
    return " ".join([*words[:start], *(words[start : start + 3] * 20)])


KINDS: dict[str, Callable[[Random, list[dict[str, str]], int], str]] = {
    "answers to other products": shuffled,
    "other languages": foreign,
    "mojibake": mojibake,
    "endless repetition": endless,
}


def write_data(folder: Path, records: int, planted: int) -> dict[int, str]:
    """``train.json``; which of its lines, from 1, are bad, and of what kind."""
    sys.path.insert(0, str(ROOT / "scripts" / "make_demo"))
    from advertising import advertise, demo_products

    draw = Random(7)
    lines = [{"src": one.src, "tgt": advertise(draw, one)} for one in demo_products(draw, records)]
    places = sorted(draw.sample(range(records), planted))
    bad = {place: list(KINDS)[number % len(KINDS)] for number, place in enumerate(places)}
    answers = {place: KINDS[kind](draw, lines, place) for place, kind in bad.items()}
    for place, answer in answers.items():
        lines[place]["tgt"] = answer
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "train.json").write_text(text, encoding="utf-8")
    return {place + 1: kind for place, kind in bad.items()}


def sft(*words: Any) -> str:
    command = [str(Path(sys.executable).with_name("sft")), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=5000)
    parser.add_argument("--planted", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--plugin", action="append", default=[])
    given = parser.parse_args()
    bad = write_data(given.folder / "data", given.records, given.planted)
    out, began = given.folder / "out", time.monotonic()
    line = [
        *("run", "--model_name_or_path", given.model, "--dataset_name_or_path", given.folder / "data"),
        *("--max_length", 256, "--per_device_train_batch_size", given.batch_size, "--num_train_epochs", 1),
        *("--learning_rate", given.learning_rate, "--warmup_steps", 20, "--lr_scheduler_type", "cosine"),
        *("--save_strategy", "steps", "--save_steps", SAVED, "--output_dir", out),
        *(word for name in given.plugin for word in ("--plugin", name)),
    ]
    print("sft", *line)
    if not (out / "model.safetensors").exists() and not (out / "adapter_model.safetensors").exists():
        sft(*line, "--overwrite_output_dir", "true")
        print(f"trained in {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    found = json.loads(sft("blame", out, "--most", max(MOST), "--json"))
    print(f"blamed in {time.monotonic() - began:.0f} s: {found['computed_steps']} of {found['steps']} steps computed\n")
    spikes = found["spikes"]
    if not all(one["is_same"] for one in spikes):
        raise SystemExit("a replayed step is not the step of the run")
    kinds = [f"{kind} ({[*bad.values()].count(kind)})" for kind in KINDS]
    print(f"| steps replayed | steps computed | records named | bad ones found | {' | '.join(kinds)} |")
    print("|---" * (4 + len(kinds)) + "|")
    for most in MOST:
        part = spikes[:most]  # those that stand out more come first
        last = {(one["step"] - 1) // SAVED: 0 for one in part}
        for one in part:
            at = (one["step"] - 1) // SAVED
            last[at] = max(last[at], one["step"] - at * SAVED)
        named = {int(each["place"].rpartition(" ")[2]) for one in part for each in one["records"]}
        hits = [bad[number] for number in named if number in bad]
        each = [str(hits.count(kind)) for kind in KINDS]
        row = [len(part), sum(last.values()), len(named), f"{len(hits)} of {len(bad)}", *each]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        if len(part) < most:
            break


if __name__ == "__main__":
    main()
