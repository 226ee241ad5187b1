"""How similar two texts are, from 0 to 1, in the measures of OpenAI's that need no model.

Each is that of a library which others compare with: rapidfuzz, sacreBLEU, NLTK (Google's BLEU) and
rouge-score. They are the extra `graders`, and imported where a grader needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from flexllm_jax.config.graders import TextSimilarityConfig
from flexllm_jax.errors import UserError
from flexllm_jax.graders.grade import Grade, GradingError, Sample, grade_each
from flexllm_jax.graders.template import Template

MOST_CHARACTERS = 2**17
_MOST_WORD_PAIRS = 4_000_000  # of ROUGE-L, whose table has one entry for each

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

    def measure(text: str, reference: str) -> float:
        if (
            kind == "rougeL"
            and (n := len(text.split()) * len(reference.split())) > _MOST_WORD_PAIRS
        ):
            raise GradingError(
                "other_error",
                f"rouge_l compares {n:,} pairs of words; at most {_MOST_WORD_PAIRS:,} fit: "
                "shorten the texts, or use rouge_1 to rouge_5",
            )
        return float(scorer.score(reference, text)[kind].fmeasure)

    return measure


_MEASURES: dict[str, Callable[[], Measure]] = {
    "fuzzy_match": _fuzzy_match,
    "bleu": _bleu,
    "gleu": _gleu,
    **{f"rouge_{n}": partial(_rouge, f"rouge{n}") for n in range(1, 6)},
    "rouge_l": partial(_rouge, "rougeL"),
}
_NOT_HERE = {
    "cosine": "it needs a model of embeddings, which this server has not",
    "meteor": "it needs WordNet, which is not a part of this package",
}


class TextSimilarity:
    """Compares the input with the reference."""

    def __init__(self, config: TextSimilarityConfig, field: str):
        metric = config.evaluation_metric
        if metric not in _MEASURES:
            reason = f", as {_NOT_HERE[metric]}" if metric in _NOT_HERE else ""
            known = ", ".join(_MEASURES)
            raise UserError(
                f"{field}.evaluation_metric: {metric!r} is not here{reason}; use one of {known}"
            )
        try:
            self._measure = _MEASURES[metric]()
        except ImportError as error:
            raise UserError(
                f"{field}.evaluation_metric: {metric} needs {error.name}: "
                "pip install 'flexllm_jax[graders]'"
            ) from None
        self._field = field
        self._input = Template(config.input, f"{field}.input")
        self._reference = Template(config.reference, f"{field}.reference")
        self.reads = self._input.reads | self._reference.reads

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """A grade for each sample."""
        return grade_each(samples, self._reward)

    def _reward(self, sample: Sample) -> float:
        return self._measure(self._text(self._input, sample), self._text(self._reference, sample))

    def _text(self, template: Template, sample: Sample) -> str:
        text = template.render(sample)
        if len(text) > MOST_CHARACTERS:
            reason = f"has {len(text):,} characters; at most {MOST_CHARACTERS:,} are compared"
            raise GradingError("other_error", f"{template.field}: {reason}")
        return text
