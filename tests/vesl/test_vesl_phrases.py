"""Noun phrases as CLOC's listing 1 takes them, by NLTK's own splitter and tagger trained on a small text."""

from __future__ import annotations

import subprocess
import sys

import pytest

from locfast.vesl.phrases import find_phrases, noun_phrases
from locfast.vesl.words import GENERIC_WORDS, STOP_WORDS

pytestmark = pytest.mark.usefixtures("nltk_data")


def test_a_phrase_is_an_article_adjectives_and_nouns_in_small_letters() -> None:
    found = find_phrases(["The old man holds two apples in his hand. A Red Dog sees the tree."])
    assert found.kept == ["the old man", "apples", "hand", "a red dog", "the tree"]


def test_sentences_are_told_apart_so_that_no_full_stop_stays_at_a_word() -> None:
    assert find_phrases(["a red dog. the big cat."]).kept == ["a red dog", "the big cat"]


def test_generic_words_go_before_words_are_tagged() -> None:
    """`a red photo dog` is one phrase: were `photo` taken out afterwards, its tag would have split or joined others."""
    assert find_phrases(["stock photo: a red image dog"]).kept == ["a red dog"]
    assert noun_phrases("photo image vectors") == []


def test_phrases_of_stop_words_alone_are_dropped_and_counted() -> None:
    found = find_phrases(["this is the same of a red house."])
    assert noun_phrases("this is the same of a red house.") == [["the", "same"], ["a", "red", "house"]]
    assert found.kept == ["a red house"] and found.dropped["stop_words"] == 1


def test_the_first_twenty_are_kept() -> None:
    nouns = ["dog", "cat", "sofa", "tree", "ball"]
    caption = ". ".join(f"a {color} {noun}" for color in ("red", "blue", "old", "big", "small") for noun in nouns)
    found = find_phrases([caption])
    assert len(found.kept) == 20 and found.dropped == {"stop_words": 0, "beyond": 5, "repeated": 0}
    assert found.kept == [" ".join(words) for words in noun_phrases(caption)][:20]


def test_a_phrase_said_twice_is_asked_for_once_and_takes_two_places() -> None:
    found = find_phrases(["a red dog. a red dog. a blue ball. the old tree."], max_phrases=3)
    assert found.kept == ["a red dog", "a blue ball"]
    assert found.dropped == {"stop_words": 0, "beyond": 1, "repeated": 1}


def test_phrases_of_several_captions_follow_each_other() -> None:
    assert find_phrases(["a red dog", "the blue ball", ""]).kept == ["a red dog", "the blue ball"]


def test_the_lists_are_of_the_papers_length() -> None:
    assert (len(STOP_WORDS), len(GENERIC_WORDS)) == (127, 61) and not STOP_WORDS & GENERIC_WORDS


def test_missing_nltk_data_is_one_message_with_the_command(tmp_path) -> None:
    code = (
        "import nltk; nltk.data.path[:] = []\n"
        "import sys; sys.argv = ['vesl', 'phrases', '--data', 'demo:4', '--out', sys.argv[1], '--workers', '0']\n"
        "from locfast.vesl.__main__ import main; main()"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 2 and "Traceback" not in told.stderr
    assert "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng" in told.stderr
