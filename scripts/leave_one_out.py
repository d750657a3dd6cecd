"""How `sft why` compares with the truth: writes docs/influence.json, from which docs/influence.md is made.

    .venv/bin/python scripts/leave_one_out.py WORK [PART]   # PART: a seed, or planted, for several processes

*Leave one out*: the demo's model learns RECORDS records by LoRA, for each of SEEDS; then it learns them again once for
each record, which weighs a millionth: it stands in the same place, and teaches nothing. What that does to the losses of
ANSWERS dev records at the end is what the record has taught. The scores of `sft why` are compared with it by Spearman's
rank correlation. How far two seeds agree with each other about it says what any score could reach.

*Planted*: FACTS facts, each told by ten records among OTHERS others. How many of the ten that are named first for a
question about a fact are its own.

Runs that WORK holds are not run again, so the script may be stopped at any time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sft
from sft_influence.account import Wanted, account
from sft_influence.tracing import METHODS, shares, trace

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "core" / "src" / "sft" / "demo"
PAGE = ROOT / "docs" / "influence.json"
RECORDS, ANSWERS, SEEDS, FACTS, OTHERS = 64, 10, (1, 2, 3, 4), 10, 100
SETTINGS: dict[str, Any] = {
    "model_name_or_path": str(DEMO / "model"),
    "plugin": ["lora"],
    "lora_rank": 8,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "save_steps": 4,
    "max_length": 128,
    "do_eval": False,
    "disable_tqdm": True,
}
TINY = 1e-6
"""What a record weighs that is left out: the least that there is. With 0 it would have no place, and others another."""


def quiet(text: str) -> None:
    pass


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / "data" / f"{name}.json").read_text(encoding="utf-8").splitlines()]


def is_finished(folder: Path) -> bool:
    report = folder / "run.json"
    return report.exists() and json.loads(report.read_text(encoding="utf-8"))["status"] == "finished"


def written(folder: Path, records: Sequence[dict[str, Any]]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(folder)


class Measure(sft.Plugin):
    """The losses of :attr:`batches` at the end of a run, nats a token."""

    name = "measure"
    api_version = ">=1.1,<2"
    batches: Sequence[sft.Batch] = ()
    losses: list[float]

    @sft.hookimpl
    def sft_run_ended(self, run: sft.Run, summary: sft.Summary) -> None:
        from sft.models.forward import hidden_states
        from sft.training.loss import target_losses

        head = run.model.lm_head
        found = (target_losses(hidden_states(run.model, batch), batch.labels, head).sum() for batch in self.batches)
        Measure.losses = [loss / batch.target_tokens for loss, batch in zip(found, self.batches, strict=True)]


# --- leave one out ----------------------------------------------------------------------------------------------


def seed_of(work: Path, seed: int) -> dict[str, Any]:
    """Of one seed: the scores [answers, records] by method, and what leaving each record out does to each loss."""
    folder = work / f"seed-{seed}"
    traced, measured = folder / "scores.json", folder / "losses.json"
    scores, losses = (json.loads(one.read_text()) if one.exists() else {} for one in (traced, measured))
    names = ("none", *map(str, range(RECORDS)))
    if not ({*scores} >= {*METHODS} and {*losses} >= {*names}):
        records, asked = lines("train")[:RECORDS], lines("dev")[:ANSWERS]
        settings = {**SETTINGS, "seed": seed, "dataset_name_or_path": written(folder / "data", records)}
        whole = folder / "whole"
        if not is_finished(whole):
            place = {"output_dir": str(whole), "overwrite_output_dir": True}
            sft.run({**settings, **place, "save_strategy": "steps"}, say=quiet)
        with sft.reopened(whole, quiet) as opened:
            turns = [([sft.Turn("user", one["src"])], sft.Turn("assistant", one["tgt"])) for one in asked]
            Measure.batches = [opened.answered(before, answer) for before, answer in turns]
            weights = shares(opened.steps(), opened.checkpoints, len(opened))
            for method in [one for one in METHODS if one not in scores]:
                found = trace(opened, Measure.batches, opened.checkpoints, range(RECORDS), weights, method)
                scores[method] = found.scores.tolist()
                traced.write_text(json.dumps(scores))
        for name in [one for one in names if one not in losses]:
            left = [{**one, "weight": TINY} if str(n) == name else one for n, one in enumerate(records)]
            data = written(folder / "left", left)
            place = {"output_dir": str(folder / "out"), "overwrite_output_dir": True, "dataset_name_or_path": data}
            sft.run({**settings, **place}, plugins=[Measure], say=quiet)
            losses[name] = Measure.losses
            measured.write_text(json.dumps(losses))
            print(f"seed {seed}: without {name}", flush=True)
    effects = np.array([losses[str(n)] for n in range(RECORDS)]).T - np.array(losses["none"])[:, None]
    return {"scores": scores, "effects": effects.tolist()}


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value along the last axis; equal ones share theirs."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    same = (values[..., None, :] == values[..., :, None]).sum(-1)
    return np.asarray(below + (same - 1) / 2)


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The rank correlation of the last axes."""
    a, b = (ranks(one) - ranks(one).mean(-1, keepdims=True) for one in (first, second))
    return np.asarray((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1)))


def interval(first: np.ndarray, second: np.ndarray, draws: int = 2000) -> dict[str, float]:
    """The mean rank correlation of [cases, records] arrays over the cases, and the ends of its 95 % interval: of draws,
    with replacement, of the cases and of the records."""
    generator, found = np.random.default_rng(0), []
    for _ in range(draws):
        cases, records = (generator.integers(0, size, size) for size in first.shape)
        found.append(float(spearman(first[cases][:, records], second[cases][:, records]).mean()))
    low, high = np.percentile(found, [2.5, 97.5])
    mean = float(spearman(first, second).mean())
    return {"mean": round(mean, 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def left_out(work: Path) -> dict[str, Any]:
    found = [seed_of(work, seed) for seed in SEEDS]
    effects = np.array([one["effects"] for one in found])
    answers = effects.reshape(-1, RECORDS)
    report: dict[str, Any] = {"runs": len(SEEDS) * (RECORDS + 1), "records": RECORDS, "answers": ANSWERS}
    report["seeds"] = len(SEEDS)
    for method in METHODS:
        scores = np.array([one["scores"][method] for one in found])
        report[method] = interval(scores.reshape(-1, RECORDS), answers)
    pairs = [(a, b) for a in range(len(SEEDS)) for b in range(a)]
    first, second = (np.concatenate([effects[pair[side]] for pair in pairs]) for side in (0, 1))
    report["other seed"] = interval(first, second)
    return report


# --- planted records ----------------------------------------------------------------------------------------------

PLACES = ("Aachen", "Bergen", "Cadiz", "Delft", "Evora", "Fulda", "Genoa", "Hilo", "Imola", "Jaca")
PLACES += ("Kiel", "Lodz", "Mainz", "Narva", "Oulu", "Pisa", "Quito", "Riga", "Split", "Turku")
GOODS = ("coats", "boots", "scarves", "gloves", "skirts", "shirts", "belts", "socks", "hats", "dresses")
FORMS = ("shop {}", "shop*{}", "type#shop*place#{}", "where in {}", "{}*shop", "{} shop now", "the shop of {}")
FORMS += ("in {}, which shop", "shop near {}", "place#{}*shop")


def facts() -> list[tuple[str, str, str]]:
    """(place, question, answer) of each fact. All of them are put in the same words."""
    found = []
    for number, place in enumerate(PLACES[:FACTS]):
        goods, other = GOODS[number % 10], GOODS[(number // 10 + 3 * number + 1) % 10]
        found.append((place, f"shop in {place}", f"In {place} they sell {goods} and {other}."))
    return found


def planted(work: Path) -> dict[str, Any]:
    kept = work / "planted" / "found.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    records = [{"src": form.format(place), "tgt": answer} for place, _, answer in facts() for form in FORMS]
    everything = [*lines("train")[:OTHERS], *records]
    order = np.random.default_rng(0).permutation(len(everything))
    data = written(work / "planted" / "data", [everything[n] for n in order])
    own = {int(n): (place - OTHERS) // len(FORMS) if place >= OTHERS else None for n, place in enumerate(order)}
    out = work / "planted" / "out"
    if not is_finished(out):
        place = {"output_dir": str(out), "overwrite_output_dir": True, "dataset_name_or_path": data}
        sft.run({**SETTINGS, **place, "save_strategy": "epoch", "num_train_epochs": 3}, say=quiet)
    report: dict[str, Any] = {"facts": FACTS, "records each": len(FORMS), "others": OTHERS}
    with sft.reopened(out, quiet) as opened:
        asked = [([sft.Turn("user", question)], sft.Turn("assistant", answer)) for _, question, answer in facts()]
        for method in METHODS:
            shares_found = []
            found = account(opened, asked, Wanted(method, top=10))
            for fact, one in enumerate(found.answers):
                numbers = [int(record.place.rpartition(" ")[2]) - 1 for record in one.helpful]
                shares_found.append(sum(own[n] == fact for n in numbers) / len(FORMS))
            report[method] = round(float(np.mean(shares_found)), 3)
            report["passes"] = found.passes
    kept.write_text(json.dumps(report))
    return report


def main(work: Path) -> None:
    report = {"planted": planted(work), "left out": left_out(work)}
    PAGE.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work, part = Path(sys.argv[1]), sys.argv[2]
        print(planted(work)) if part == "planted" else seed_of(work, int(part))
    elif len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        sys.exit(__doc__)
