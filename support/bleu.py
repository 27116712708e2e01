"""BLEU, the likeness of a text to any of several: what VRFT-Aug's recitation reward measures."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice

WORD = re.compile(r"[^\W_]+")
MAX_WORDS = 4_000  # of a hypothesis: the rest is not read


def bleu(hypothesis: str, references: Sequence[str], n: int = 4) -> float:
    """BLEU = min(1, e^(1 - r/c)) (p_1 ... p_K)^(1/K), in [0, 1].

    c: words in the hypothesis. r: words in the reference whose length is closest to c, the shorter
    of two as close. p_k: the share of the hypothesis' k-grams found in the references, each counted
    at most as often as in the one that has it most. K = min(n, c).

    The p_k without a hit count as 1/2, 1/4, ... of one hit ("exp" smoothing); with no word in
    common, or no reference, BLEU is 0. So it is sacrebleu's sentence_bleu(hypothesis, references),
    effective order on, of lower-case words. Of VRFT-Aug no more than "BLEU" is public: order,
    smoothing, words and what is a reference are our choice.

    >>> bleu("The lens is RED.", ["x", "the lens is red"]), bleu("x", ["y"])  # all; none
    (1.0, 0.0)
    >>> round(bleu("a b", ["a b c d"]), 4)  # e^(1 - 4/2)
    0.3679
    """
    words = words_of(hypothesis, MAX_WORDS)
    targets = [words_of(reference) for reference in references]
    if not words or not targets:
        return 0.0
    log_precisions, halved = [], 1.0
    for k in range(1, min(n, len(words)) + 1):
        known: Counter = Counter()
        for target in targets:
            known |= ngrams(target, k)  # the maximum of the counts
        hits = (ngrams(words, k) & known).total()
        if k == 1 and not hits:
            return 0.0
        if not hits:
            halved /= 2
        log_precisions.append(math.log((hits or halved) / (len(words) - k + 1)))
    lengths = [len(target) for target in targets]
    closest = min(lengths, key=lambda length: (abs(length - len(words)), length))
    brevity = min(1.0, math.exp(1 - closest / len(words)))
    return brevity * math.exp(sum(log_precisions) / len(log_precisions))


def words_of(text: str, limit: int | None = None) -> list[str]:
    return [found[0] for found in islice(WORD.finditer(text.lower()), limit)]


def ngrams(words: list[str], k: int) -> Counter:
    return Counter(zip(*(words[i:] for i in range(k))))
