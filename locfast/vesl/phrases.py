"""Noun phrases of a caption, as CLOC's listing 1 takes them (appendix B.1).

The caption in small letters, cut into words; generic words taken out; the rest tagged with parts of speech; and of what
is left, each run of an article (or none), adjectives and at least one noun. NLTK cuts, tags and chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from locfast.errors import UserError
from locfast.vesl.words import GENERIC_WORDS, STOP_WORDS

GRAMMAR = "NP: {<DT>?<JJ.*>*<NN.*>+}"
"""The listing prints `<NP: {...}`, an angle bracket too many, which NLTK does not take."""
DATA = ("punkt_tab", "averaged_perceptron_tagger_eng")
MAX_PHRASES = 20


@dataclass
class Phrases:
    """What the captions of an image gave."""

    kept: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=lambda: {"stop_words": 0, "beyond": 0, "repeated": 0})
    """stop_words: of stop words alone; beyond: after the first `max_phrases`; repeated: said before."""


def find_phrases(captions: Iterable[str], max_phrases: int = MAX_PHRASES) -> Phrases:
    """Of one caption, the phrases of listing 1 without those that it says twice.

    A phrase that is repeated counts among the first `max_phrases`, as there, and is asked for once: the detector would
    give it the same scores twice. Of several captions the phrases follow each other in the captions' order.
    """
    found = Phrases()
    for caption in captions:
        for words in noun_phrases(caption):
            phrase = " ".join(words)
            if STOP_WORDS.issuperset(words):
                found.dropped["stop_words"] += 1
            elif len(found.kept) + found.dropped["repeated"] >= max_phrases:
                found.dropped["beyond"] += 1
            elif phrase in found.kept:
                found.dropped["repeated"] += 1
            else:
                found.kept.append(phrase)
    return found


def noun_phrases(caption: str) -> list[list[str]]:
    """The words of every noun phrase, in their order, phrases of stop words among them."""
    import nltk

    words = [word for word in nltk.word_tokenize(caption.lower()) if word not in GENERIC_WORDS]
    if not words:
        return []
    tree = _chunker().parse(nltk.pos_tag(words))
    return [[word for word, _ in chunk.leaves()] for chunk in tree.subtrees(lambda one: one.label() == "NP")]


def check_nltk() -> None:
    """Raises UserError, with what to type, where NLTK or its data is not there."""
    try:
        import nltk
    except ImportError:
        raise UserError(
            "noun phrases need NLTK, which is not installed. Type `pip install nltk`, then "
            f"`python -m nltk.downloader {' '.join(DATA)}`"
        ) from None
    try:
        nltk.pos_tag(nltk.word_tokenize("a dog"))
    except LookupError:
        raise UserError(
            f"noun phrases need NLTK's data {' and '.join(DATA)}, and not all of it is there. Type `python -m "
            f"nltk.downloader {' '.join(DATA)}`; where there is no network, NLTK_DATA names a folder with them"
        ) from None


@functools.cache
def _chunker() -> Any:
    import nltk

    return nltk.RegexpParser(GRAMMAR)
