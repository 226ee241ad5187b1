"""How similar two texts are, from 0 to 1: a program that runs in a process of its own, as rapidfuzz
holds Python up for seconds where texts are long. It stands alone, as its text is sent there.

Each measure is that of a library which others compare with: rapidfuzz, sacreBLEU, NLTK (Google's
BLEU) and rouge-score. They are imported where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

Measure = Callable[[str, str], float]  # of a text and a reference


def _fuzzy_match() -> Measure:
    """As the grader in OpenAI's guide does it."""
    from rapidfuzz import fuzz, utils

    return lambda text, reference: (
        fuzz.WRatio(text, reference, processor=utils.default_process) / 100
    )


def _words() -> Callable[[str], str]:
    """sacreBLEU's default words, with spaces between them. It keeps 65,536 texts that it has seen,
    however long they are; that is not wanted here."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    tokenizer = Tokenizer13a()

    def words(text: str) -> str:
        divided = tokenizer(text)
        for kind in (Tokenizer13a, TokenizerRegexp):
            kind.__call__.cache_clear()
        return divided

    return words


def _bleu() -> Measure:
    from sacrebleu.metrics.bleu import BLEU

    words = _words()
    bleu = BLEU(tokenize="none", effective_order=True)  # a sentence may have fewer than four words
    return lambda text, reference: bleu.sentence_score(words(text), [words(reference)]).score / 100


def _gleu() -> Measure:
    from nltk.translate.gleu_score import sentence_gleu

    words = _words()
    return lambda text, reference: float(
        sentence_gleu([words(reference).split()], words(text).split())
    )


def _rouge(kind: str) -> Measure:
    """F of precision and recall, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind])
    return lambda text, reference: float(scorer.score(reference, text)[kind].fmeasure)


MEASURES: dict[str, Callable[[], Measure]] = {
    "fuzzy_match": _fuzzy_match,
    "bleu": _bleu,
    "gleu": _gleu,
    **{f"rouge_{n}": partial(_rouge, f"rouge{n}") for n in range(1, 6)},
    "rouge_l": partial(_rouge, "rougeL"),
}


@cache
def _measure(metric: str) -> Measure:
    return MEASURES[metric]()


def grade(sample: dict[str, str], item: object) -> float:
    """How similar two texts are."""
    return _measure(sample["metric"])(sample["input"], sample["reference"])
