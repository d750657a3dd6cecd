"""How near answers come to reference answers: BLEU-4 (sacrebleu) and ROUGE-1, -2 and -L (rouge-score), 0 to 1.

Text is cut into words, and where words have no spaces between them (Chinese characters, kana) into characters.
What is counted adds up over processes; the scores are computed from the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import regex

from sft.settings.best_metric import ANSWER_SCORES

_ROUGE = ("rouge1", "rouge2", "rougeL")
_ORDERS = 4

_CHARACTER = r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc]"
_SPACED = regex.compile(rf"({_CHARACTER}|[\u3000-\u303f\uff00-\uffef])")
_TOKEN = regex.compile(rf"{_CHARACTER}|(?:(?!{_CHARACTER})[\p{{L}}\p{{M}}\p{{N}}])+")


def spaced(text: str) -> str:
    """``text`` with spaces around each character that is a word of its own, and around its punctuation."""
    return " ".join(_SPACED.sub(r" \1 ", text).split())


class _Words:
    """rouge-score's own tokenizer drops all that is not a-z or 0-9; on such text this one does the same."""

    def tokenize(self, text: str) -> list[str]:
        return [str(token) for token in _TOKEN.findall(text.lower())]


def count(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """What the scores of these answers are computed from; element-wise sums are the counts of all together.

    BLEU's matched and all n-grams for n = 1 to 4, the tokens of answers and of references; the three ROUGE
    F-measures, each summed over records; the number of records.
    """
    if not answers:
        return [0.0] * (2 * _ORDERS + 2 + len(_ROUGE) + 1)
    from rouge_score.rouge_scorer import RougeScorer

    bleu = _bleu().corpus_score([spaced(text) for text in answers], [[spaced(text) for text in references]])
    scorer = RougeScorer(list(_ROUGE), tokenizer=_Words())
    rouge = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    measures = [sum(float(score[name].fmeasure) for score in rouge) for name in _ROUGE]
    return [*map(float, bleu.counts), *map(float, bleu.totals), bleu.sys_len, bleu.ref_len, *measures, len(answers)]


def scores(counts: Sequence[float]) -> dict[str, float]:
    """Corpus BLEU-4 (mteval-v13a's tokens and smoothing), and the mean of the records' ROUGE F-measures."""
    matched, every = list(counts[:_ORDERS]), list(counts[_ORDERS : 2 * _ORDERS])
    answered, referred, *measures, records = counts[2 * _ORDERS :]
    bleu = _bleu().compute_bleu(matched, every, int(answered), int(referred), smooth_method="exp")
    values = [bleu.score / 100, *(measure / records for measure in measures)]
    return dict(zip(ANSWER_SCORES, map(float, values), strict=True))


def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    # force: it takes a full stop with a space before it for text that has been tokenized before.
    return BLEU(tokenize="13a", smooth_method="exp", max_ngram_order=_ORDERS, force=True)
