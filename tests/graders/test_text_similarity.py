"""text_similarity: the numbers of the formulas, worked out here; what is not there, by name."""

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from math import exp, log, prod
from pathlib import Path

import pytest

from flexllm_jax.config.sections.graders import GradersSection, read_grader
from flexllm_jax.errors import UserError
from flexllm_jax.graders import Grade, Grader, Sample, make_grader, measures

TEXT = "the cat sat on the mat today"
REFERENCE = "the cat is on the mat"


def grader_of(metric: str) -> Grader:
    told = {"type": "text_similarity", "evaluation_metric": metric, "pass_threshold": 0.8}
    fields = {"input": "{{ sample.output_text }}", "reference": "{{ item.x }}"}
    return make_grader(read_grader(told | fields))


def similarity(metric: str, text: str = TEXT, reference: str = REFERENCE) -> Grade:
    (grade,) = grader_of(metric).grade([Sample(text, {"x": reference})])
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


def test_bleu_is_sacrebleus():
    from sacrebleu import sentence_bleu

    text, reference = "It costs 3.50, he said: 'so what?'", "It costs 3.5, she said: 'what?'"
    expected = sentence_bleu(text, [reference]).score / 100
    assert similarity("bleu", text, reference).reward == pytest.approx(expected)


def test_no_text_is_kept():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    for metric in ("bleu", "gleu"):
        texts = {"metric": metric, "input": "a b, c", "reference": "a b c"}
        assert 0 < measures.grade(texts, None) < 1
        assert Tokenizer13a.__call__.cache_info().currsize == 0


def test_long_texts_are_refused():
    assert "grader.input: has 131,073 characters" in (similarity("bleu", "x" * 131_073).error or "")


def test_one_that_takes_long_is_ended_and_holds_nobody_up():
    """rapidfuzz takes ten seconds for these, and lets no other thread run meanwhile."""
    letters = "abcdefgh "
    texts = [Sample("".join(random.Random(n).choices(letters, k=n)), {"x": "a" * 9}) for n in
             (16_000, 9, 9)]  # fmt: skip
    reference = "".join(random.Random(1).choices(letters, k=5_000))
    told = {"type": "text_similarity", "evaluation_metric": "fuzzy_match"}
    told |= {"input": "{{ sample.output_text }}", "reference": reference}
    settings = GradersSection(timeout_s=0.5, processes=1)
    grader = make_grader(read_grader(told), settings=settings)
    slowest, running = 0.0, True

    def watch() -> None:
        nonlocal slowest
        while running:
            begin = time.perf_counter()
            time.sleep(0.001)
            slowest = max(slowest, time.perf_counter() - begin)

    watcher = threading.Thread(target=watch)
    watcher.start()
    first, second, third = grader.grade(texts)
    running = False
    watcher.join()
    assert first.error == "grader: it took over 0.5 s"
    assert not second.failed and not third.failed
    assert slowest < 0.4


def test_processes_are_kept_for_all_graders():
    """Two work at once by default: there are no more, whichever graders and however many."""
    similarity("fuzzy_match")
    before = _children()
    for metric in ("fuzzy_match", "bleu") * 4:
        grades = grader_of(metric).grade([Sample("a", {"x": "a"})] * 20)
        assert [grade.failed for grade in grades] == [False] * 20
    assert before and _children() >= before
    assert len(_children() - before) <= 1


def test_processes_end_with_the_one_that_started_them():
    program = (
        "from tests.graders.test_text_similarity import _children, similarity\n"
        "similarity('fuzzy_match')\n"
        "print(*_children(), flush=True)\n"
        "import os; os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    (child,) = done.stdout.split()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def _children() -> set[str]:
    told = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return {child for text in told for child in text.split()}


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
