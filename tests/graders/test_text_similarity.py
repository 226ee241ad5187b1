"""text_similarity: the numbers of the formulas, worked out here; what is not there, by name."""

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from math import exp, log, prod

import pytest

from flexllm_jax.config.graders import read_grader
from flexllm_jax.errors import UserError
from flexllm_jax.graders import Sample, make_grader

TEXT = "the cat sat on the mat today"
REFERENCE = "the cat is on the mat"


def similarity(metric: str, text: str = TEXT, reference: str = REFERENCE):
    told = {"type": "text_similarity", "evaluation_metric": metric, "pass_threshold": 0.8}
    fields = {"input": "{{ sample.output_text }}", "reference": "{{ item.x }}"}
    (grade,) = make_grader(read_grader(told | fields)).grade([Sample(text, {"x": reference})])
    return grade


def _grams(text: str, n: int) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _shared(n: int) -> int:
    return (_grams(TEXT, n) & _grams(REFERENCE, n)).total()


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + _longest_common(a[1:], b[1:])
    return max(_longest_common(a[1:], b), _longest_common(a, b[1:]))


def _f(shared: int, n: int) -> float:
    lengths = _grams(TEXT, n).total() + _grams(REFERENCE, n).total()
    return 2 * shared / lengths


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_rouge_n(n):
    assert similarity(f"rouge_{n}").reward == pytest.approx(_f(_shared(n), n))


def test_rouge_l():
    common = _longest_common(TEXT.split(), REFERENCE.split())
    assert similarity("rouge_l").reward == pytest.approx(_f(common, 1))


def test_bleu():
    """Papineni's, with sacreBLEU's smoothing of the orders that share nothing."""
    precisions, halving = [], 1.0
    for n in range(1, 5):
        shared = _shared(n)
        if not shared:
            halving *= 2
        precisions.append((shared or 1 / halving) / _grams(TEXT, n).total())
    assert len(TEXT.split()) > len(REFERENCE.split())  # no penalty of brevity
    expected = exp(sum(map(log, precisions)) / 4)
    assert similarity("bleu").reward == pytest.approx(expected)
    assert prod(precisions) > 0


def test_gleu():
    """Google's: the less of precision and recall over all n-grams of one to four words."""
    shared = sum(_shared(n) for n in range(1, 5))
    most = max(sum(_grams(text, n).total() for n in range(1, 5)) for text in (TEXT, REFERENCE))
    assert similarity("gleu").reward == pytest.approx(shared / most)


def test_fuzzy_match_is_that_of_openais_guide():
    from rapidfuzz import fuzz, utils

    expected = fuzz.WRatio(TEXT, REFERENCE, processor=utils.default_process) / 100
    assert similarity("fuzzy_match").reward == pytest.approx(expected)
    assert similarity("fuzzy_match", "  PARIS!", "paris").reward == 1


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_l"])
def test_bounds(metric):
    assert similarity(metric, REFERENCE, REFERENCE).reward == pytest.approx(1)
    for text, reference in [("", REFERENCE), (TEXT, ""), ("", ""), ("xyz", "ab cd"), ("\0", "é")]:
        assert 0 <= similarity(metric, text, reference).reward <= 1


@pytest.mark.parametrize(
    ("metric", "why"),
    [("cosine", "a model of embeddings"), ("meteor", "WordNet"), ("rouge_9", "use one of fuzzy")],
)
def test_what_is_not_here_is_refused_by_name(metric, why):
    with pytest.raises(UserError) as error:
        similarity(metric)
    message = str(error.value)
    assert (
        message.startswith(f"grader.evaluation_metric: {metric!r} is not here") and why in message
    )
    assert "rouge_l" in message


def test_bleu_is_sacrebleus_and_no_text_is_kept():
    from sacrebleu import sentence_bleu
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    text, reference = "It costs 3.50, he said: 'so what?'", "It costs 3.5, she said: 'what?'"
    expected = sentence_bleu(text, [reference]).score / 100
    Tokenizer13a.__call__.cache_clear()
    assert similarity("bleu", text, reference).reward == pytest.approx(expected)
    assert similarity("gleu", text, reference).reward > 0.2
    assert Tokenizer13a.__call__.cache_info().currsize == 0


def test_long_texts_are_refused():
    long = "a b " * 1001
    assert "pairs of words" in (similarity("rouge_l", long, long).error or "")
    assert not similarity("rouge_1", long, long).failed
    assert "grader.input: has 131,073 characters" in (similarity("bleu", "x" * 131_073).error or "")


def test_without_the_extra_its_name_is_told():
    program = (
        "import sys; sys.modules['rapidfuzz'] = None\n"
        "from tests.graders.test_text_similarity import similarity\n"
        "from flexllm_jax.errors import UserError\n"
        "try: similarity('fuzzy_match')\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = "grader.evaluation_metric: fuzzy_match needs rapidfuzz: "
    assert done.stdout == f"{said}pip install 'flexllm_jax[graders]'\n", done.stderr
