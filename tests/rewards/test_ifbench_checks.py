"""IFBench's instructions on responses whose counts are in reach of a finger."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rewards.ifbench_checks import CHECKS
from rewards.instructions import score

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "ifeval_541.jsonl"

EMOJI = "\U0001f600"
SPAN = {"prompt_to_repeat": "zero one two three four", "n_start": 1, "n_end": 3}
FIVE = {f"keyword{i}": word for i, word in enumerate("abcde", start=1)}
FIVE_COUNTED = "a b b c c c d d d d d e e e e e e e"
TEN = "level radar civic kayak refer rotor madam tenet minim sagas"

# (instruction, its kwargs, a response that follows it, one that does not)
TABLE: list[tuple[str, dict[str, Any], str, str]] = [
    ("count:word_count_range", {"min_words": 3, "max_words": 4}, "one two three", "1 2 3 4 5"),
    ("count:unique_word_count", {"N": 3}, "one two one three", "one two One two,"),
    ("count:conjunctions", {"small_n": 2}, "tea and milk, but no sugar", "tea and milk and sugar"),
    ("count:person_names", {"N": 2}, "Emma met Liam here", "Emma met Liams Emma"),
    ("count:numbers", {"N": 2}, "from 3.5 up to 1,000", "from 3 up to 4 or 5"),
    ("count:punctuation", {}, "Yes, no; why: so! Now? Here. What?!", "Yes, no; why: so! Now?!"),
    ("count:pronouns", {"N": 3}, "She/her told us so", "She told Anna so"),
    ("count:keywords_multiple", FIVE, FIVE_COUNTED, FIVE_COUNTED + " e"),
    ("ratio:stop_words", {"percentage": 50}, "the red fox and bird", "the fox and the bird"),
    ("ratio:sentence_type", {}, "It is. It was. Is it?", "It is. Is it? Was it?"),
    ("ratio:sentence_balance", {}, "It is. Is it? So it is!", "It is. It is. Is it? So it is!"),
    ("ratio:sentence_words", {}, "One cat. Two dog. Red fox.", "One cat. One dog. Red fox."),
    # Three trigrams, of which the reference has two, one.
    (
        "ratio:overlap",
        {"reference_text": "a b c d", "percentage": 66},
        "a b c d e",
        "a b c e f",
    ),
    ("words:alphabet", {}, "Yes, zebras are big", "Yes, zebras big are"),
    ("words:vowel", {}, "a red bird sat", "a red bird sat on us"),
    ("words:consonants", {}, "small black cats", "small black cat sofa"),
    ("words:palindrome", {}, TEN, TEN.replace("level", "lever")),
    ("words:prime_lengths", {}, "it was a-b seven", "it was four words"),
    ("words:repeats", {"small_n": 2}, "go and go home", "go, Go and go"),
    ("words:last_first", {}, "We ran home. Home is here.", "We ran home. Here is home."),
    ("words:paragraph_last_first", {}, "home is home\nyou, you", "home is here\nyou, you"),
    ("words:no_consecutive", {}, "red fox ran far", "red fox ran right"),
    (
        "words:keywords_specific_position",
        {"keyword": "fox", "n": 2, "m": 2},
        "It ran. A fox, red.",
        "A fox ran. It is a fox.",
    ),
    ("words:words_position", {"keyword": "key"}, "a key is the key here", "a key is the end here"),
    # 0 alliterative words, then 2 (big bad), then 3.
    (
        "sentence:alliteration_increment",
        {},
        "It ran. The big bad fox. So she sang on.",
        "The big bad fox. So she ran on.",
    ),
    ("sentence:keyword", {"word": "fox", "N": 2}, "It ran. A Fox did.", "A fox ran. Foxes did."),
    ("sentence:increment", {"small_n": 2}, "It ran. Then it ran off.", "It ran. Then it ran."),
    ("format:parentheses", {}, "so ((([[deep]]))) it goes", "so (((([deep])) it goes"),
    ("format:quotes", {}, '"he said \'she "did" it\' now"', '"he said \'it\'s so\' now" ""'),
    ("format:options", {"options": "yes/no/maybe"}, "Yes.", "Yes, since it is so."),
    ("format:newline", {}, "one\ntwo\n\nthree.", "one\ntwo three"),
    ("format:emoji", {}, f"It rains {EMOJI}. We stay! {EMOJI}", f"It rains. We stay in {EMOJI}."),
    ("format:line_indent", {}, "one\n two\n   three", "one\n two\n two and more"),
    ("format:quote_unquote", {}, '"so it is" means yes', 'it means "yes" "so it is"'),
    ("format:list", {"sep": "!?!?"}, "!?!? one thing\n!?!? two", "!?!? one thing !?!? two"),
    ("format:thesis", {}, "<i>It rains.</i> For a day", "<i>It rains for a day.</i>"),
    ("format:sub-bullets", {}, "* one\n - a\n* two\n - b", "* one\n - a - b\n* two-fold"),
    ("format:no_bullets_bullets", {}, "It is. So.\n* one\n* two", "It is so.\n* one\n* two"),
    ("format:title_case", {}, "The Red Fox Ran", "The Red fox Ran"),
    (
        "format:output_template",
        {},
        "My Answer: a\nMy Conclusion: b\nFuture Outlook: c",
        "My Conclusion: b\nMy Answer: a\nFuture Outlook: c",
    ),
    ("format:no_whitespace", {}, "one-two-three", "one-two- three"),
    (
        "repeat:repeat_change",
        {"prompt_to_repeat": "Say it again"},
        "Write it again",
        "Say it again",
    ),
    ("repeat:repeat_span", SPAN, "One two three", "one two three four"),
]


def test_the_table_has_every_instruction() -> None:
    assert {name for name, *_ in TABLE} == set(CHECKS)


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), TABLE, ids=[row[0] for row in TABLE])
def test_one_response_follows_and_another_does_not(
    name: str, kwargs: dict[str, Any], good: str, bad: str
) -> None:
    found = score(good, instruction_id_list=[name], kwargs=[kwargs], min_words=1)
    assert found.reward == 1.0, found.reason
    broken = score(bad, instruction_id_list=[name], kwargs=[kwargs], min_words=1)
    assert broken.reward == 0.0
    assert broken.reason.startswith(name)


HOSTILE = [
    *("", " ", "\x00\ud800", "." * 100_000, "a " * 50_000, "\n" * 100_000, "'\"" * 50_000),
    *("(" * 100_000, "<i>" * 30_000, "* " * 50_000, "?!" * 50_000, "9" * 100_000, "a. " * 30_000),
    *("***\n" * 20_000, '"' * 100_000, "\u200d" * 50_000, "[" * 100_000, "<<" * 50_000),
]


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_every_check_ends_in_time_on_any_response(
    row: tuple[str, dict[str, Any], str, str],
) -> None:
    name, kwargs, *_ = row
    for response in HOSTILE:
        for loose in (False, True):
            start = time.monotonic()
            score(response, instruction_id_list=[name], kwargs=[kwargs], loose=loose)
            assert time.monotonic() - start < 3.0, response[:10]


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ("I know or I don't know", "i know", "I do"),
        ("a), b), c), d)", "b)", "B"),
        ("red, green", "Green!", "blue"),
    ],
)
def test_options_are_written_in_three_ways(options: str, good: str, bad: str) -> None:
    row: dict[str, Any] = {
        "instruction_id_list": ["format:options"],
        "kwargs": [{"options": options}],
    }
    assert score(good, **row).reward == 1.0
    assert score(bad, **row).reward == 0.0


@pytest.mark.skipif(not DATA.exists(), reason="IFEval's rows are not here")
def test_every_row_of_ifeval_can_be_checked() -> None:
    rows = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
    assert len(rows) == 541
    for row in rows:
        given = {key: row[key] for key in ("instruction_id_list", "kwargs")}
        assert score("", **given).reward == 0.0
        found = score("some words of no consequence", **given)
        assert 0.0 <= found.terms["followed"] <= 1.0
