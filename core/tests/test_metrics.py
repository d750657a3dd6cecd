"""Scores of answers: against the formulas written out, and the libraries' own tokenizers where these are right."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from sft.training import answer_scores as metrics

ENGLISH = [
    ("The cat sat on the mat, and it slept.", "The cat lay on the mat, and then it slept."),
    ("A red coat for cold days; price: 3.50!", "A warm red coat for cold days, price 3.50."),
    ("completely different words here", "nothing of this is shared by them"),
]
CHINESE = [
    ("这件红色的连衣裙很漂亮，适合夏天。", "这条红色连衣裙非常漂亮，很适合夏天穿。"),
    ("价格是100元", "价格为100元。"),
]


def score(pairs: list[tuple[str, str]]) -> dict[str, float]:
    return metrics.scores(metrics.count([answer for answer, _ in pairs], [reference for _, reference in pairs]))


def grams(tokens: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def bleu(pairs: list[tuple[list[str], list[str]]]) -> float:
    """Papineni et al. 2002: BP · exp(mean of log p_n), counts clipped and summed over the corpus; no count is 0."""
    logarithms = []
    for order in (1, 2, 3, 4):
        matched = sum(sum((grams(a, order) & grams(r, order)).values()) for a, r in pairs)
        every = sum(sum(grams(a, order).values()) for a, _ in pairs)
        logarithms.append(math.log(Fraction(matched, every)))
    answered, referred = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    brevity = 1.0 if answered > referred else math.exp(1 - referred / answered)
    return brevity * math.exp(sum(logarithms) / 4)


def rouge_n(answer: list[str], reference: list[str], order: int) -> float:
    """Lin 2004, as an F1 of n-gram overlap."""
    matched = sum((grams(answer, order) & grams(reference, order)).values())
    precision, recall = (Fraction(matched, sum(grams(side, order).values())) for side in (answer, reference))
    return float(2 * precision * recall / (precision + recall)) if matched else 0.0


def rouge_l(answer: list[str], reference: list[str]) -> float:
    table = np.zeros((len(answer) + 1, len(reference) + 1), int)
    for i, left in enumerate(answer, start=1):
        for j, right in enumerate(reference, start=1):
            table[i, j] = table[i - 1, j - 1] + 1 if left == right else max(table[i - 1, j], table[i, j - 1])
    precision, recall = table[-1, -1] / len(answer), table[-1, -1] / len(reference)
    return float(2 * precision * recall / (precision + recall)) if table[-1, -1] else 0.0


def test_english_by_the_papers_formulas() -> None:
    """13a's tokens for BLEU: punctuation apart, but not inside a number. ROUGE: lower case, no punctuation."""
    answers = ["The cat sat on the mat , and it slept .", "A red coat for cold days ; price : 3.50 !", ENGLISH[2][0]]
    references = ["The cat lay on the mat , and then it slept .", "A warm red coat for cold days , price 3.50 ."]
    tokens = [(a.split(), r.split()) for a, r in zip(answers, [*references, ENGLISH[2][1]], strict=True)]
    found = score(ENGLISH)
    assert found["bleu4"] == pytest.approx(bleu(tokens), rel=1e-12)
    words = [("the cat sat on the mat and it slept", "the cat lay on the mat and then it slept")]
    words += [("a red coat for cold days price 3 50", "a warm red coat for cold days price 3 50"), ENGLISH[2]]
    split = [(a.split(), r.split()) for a, r in words]
    for order in (1, 2):
        mean = sum(rouge_n(a, r, order) for a, r in split) / 3
        assert found[f"rouge{order}"] == pytest.approx(mean, rel=1e-12)
    assert found["rougel"] == pytest.approx(sum(rouge_l(a, r) for a, r in split) / 3, rel=1e-12)


def test_chinese_is_scored_by_character() -> None:
    tokens = [(list(a.replace("100", "#")), list(r.replace("100", "#"))) for a, r in CHINESE]
    found = score(CHINESE)
    assert found["bleu4"] == pytest.approx(bleu(tokens), rel=1e-12)
    words = [([t for t in a if t not in "，。"], [t for t in r if t not in "，。"]) for a, r in tokens]
    for order in (1, 2):
        mean = sum(rouge_n(a, r, order) for a, r in words) / 2
        assert found[f"rouge{order}"] == pytest.approx(mean, rel=1e-12)
    assert found["rougel"] == pytest.approx(sum(rouge_l(a, r) for a, r in words) / 2, rel=1e-12)
    assert found["rouge1"] > 0.7


def test_libraries_agree_where_their_own_tokenizers_apply() -> None:
    """sacrebleu's default on English and its zh on Chinese; rouge-score's default, which knows a-z and 0-9 only."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    for pairs, tokenizer in ((ENGLISH, "13a"), (CHINESE, "zh")):
        answers, references = (list(side) for side in zip(*pairs, strict=True))
        own = BLEU(tokenize=tokenizer).corpus_score(answers, [references]).score / 100
        assert score(pairs)["bleu4"] == pytest.approx(own, rel=1e-12)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    own = [scorer.score(reference, answer) for answer, reference in ENGLISH]
    for name in ("rouge1", "rouge2", "rougeL"):
        mean = sum(item[name].fmeasure for item in own) / 3
        assert score(ENGLISH)[name.lower()] == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Red coat's 2nd price: 3.50!", ["red", "coat", "s", "2nd", "price", "3", "50"]),
        ("红色coat，很漂亮！", ["红", "色", "coat", "很", "漂", "亮"]),
        ("東京タワーへ行く", ["東", "京", "タ", "ワ", "ー", "へ", "行", "く"]),
        ("𠮷野家 100円", ["𠮷", "野", "家", "100", "円"]),
        ("Ça coûte très cher", ["ça", "coûte", "très", "cher"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("안녕 세계", ["안녕", "세계"]),
        ("?! …", []),
    ],
)
def test_words_and_characters(text: str, tokens: list[str]) -> None:
    assert metrics._Words().tokenize(text) == tokens


def test_equal_answers_score_one_and_unrelated_ones_nothing() -> None:
    for pairs in (ENGLISH, CHINESE):
        found = score([(reference, reference) for _, reference in pairs])
        assert found == pytest.approx(dict.fromkeys(metrics.ANSWER_SCORES, 1.0), rel=1e-12)
    assert score([("aa bb cc dd", "ee ff gg hh")]) == dict.fromkeys(metrics.ANSWER_SCORES, 0.0)
    assert score([("", "ee ff gg hh")]) == dict.fromkeys(metrics.ANSWER_SCORES, 0.0)


def test_counts_of_shares_add_up_to_those_of_all() -> None:
    """Whoever has no record counts nothing."""
    pairs = [*ENGLISH, *CHINESE]
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    every = metrics.count(*sides)
    shares = [metrics.count(*(side[rank::7] for side in sides)) for rank in range(7)]
    np.testing.assert_allclose(np.sum(shares, axis=0), every, rtol=1e-12)
    assert all(len(share) == len(every) for share in shares)
