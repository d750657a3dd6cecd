"""Write a corpus: ``corpus.py base FOLDER`` or ``corpus.py demo FOLDER`` writes train.json and dev.json."""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random

from advertising import advertise, demo_products
from plain_tasks import plain_task

BASE_LINES = (36_000, 400)
DEMO_LINES = (400, 40)
SEED = 20240

Line = dict[str, str]


def demo_corpus() -> tuple[list[Line], list[Line]]:
    """The demo data set, (train, dev): no two lines have the same attributes."""
    random = Random(SEED)
    products = demo_products(random, sum(DEMO_LINES))
    lines = [{"src": product.src, "tgt": advertise(random, product)} for product in products]
    return lines[: DEMO_LINES[0]], lines[DEMO_LINES[0] :]


def base_corpus() -> tuple[list[Line], list[Line]]:
    """The plain corpus, (train, dev): no product of the demo data set, no dev line in train."""
    held_out = frozenset(product.identity for product in demo_products(Random(SEED), sum(DEMO_LINES)))
    random = Random(SEED + 1)
    dev: dict[str, Line] = {}
    while len(dev) < BASE_LINES[1]:
        src, tgt = plain_task(random, held_out)
        dev[src] = {"src": src, "tgt": tgt}
    train: list[Line] = []
    while len(train) < BASE_LINES[0]:
        src, tgt = plain_task(random, held_out)
        if src not in dev:
            train.append({"src": src, "tgt": tgt})
    return train, list(dev.values())


def uncovered(base: Iterable[Line], demo: Iterable[Line], fewest: int = 8) -> dict[str, int]:
    """The words of the demo's copy which the base corpus' answers hold fewer than ``fewest`` times."""

    def words(lines: Iterable[Line]) -> Counter[str]:
        return Counter(word for line in lines for word in re.findall(r"[a-z]+", line["tgt"].lower()))

    known = words(base)
    return {word: known[word] for word in sorted(words(demo)) if known[word] < fewest}


def write(folder: Path, train: list[Line], dev: list[Line]) -> None:
    """Write ``train.json`` and ``dev.json``, one JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("train", train), ("dev", dev)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Write one of the two corpora, or list the words of the demo that the base corpus lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=("base", "demo"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    train, dev = base_corpus() if arguments.which == "base" else demo_corpus()
    write(arguments.folder, train, dev)
    print(f"{arguments.folder}: {len(train)} lines to train on, {len(dev)} to judge by")
    if arguments.which == "base" and (rare := uncovered(train, demo_corpus()[0])):
        print("words of the demo's copy that are rare in the base corpus:", rare)


if __name__ == "__main__":
    main()
