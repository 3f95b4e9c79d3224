import time
from typing import Any

import pytest

from rewards import RewardError
from rewards.instruction_checks import CHECKS
from rewards.instructions import score

# (instruction, its kwargs, a response that follows it, one that does not)
TABLE: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["red", "fox"]}, "a Red fox ran", "a red dog ran"),
    (
        "keywords:frequency",
        {"keyword": "go", "frequency": 2, "relation": "at least"},
        "go and go home",
        "go home right now",
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["cat"]},
        "do not concatenate it",
        "a cat ran",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
        "one zebra is here",
        "puzzles are here now",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "less than"},
        "only three words",
        "here are four words",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "It rains. We stay in!",
        "It rains, we stay in.",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "the first one\n***\nthe second",
        "the first one\n\nthe second",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "It rained.\n\nThen it stopped.",
        "It rained.\n\nIt stopped then.",
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "Dear [name], come to [place]",
        "Dear [name], come to us",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "See you then. P.S. bring tea",
        "See you then, bring tea",
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* one thing\n- another thing",
        "* one thing and no other",
    ),
    ("detectable_format:constrained_response", {}, "My answer is no.", "My answer is never."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "a *bold* and **bolder** claim",
        "a *bold* and ** ** claim",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1 rest\nDay 2 run",
        "Day 1 rest and then run",
    ),
    (
        "detectable_format:json_format",
        {},
        '```json\n{"a": 1, "b": 2}\n```',
        'a JSON: {"a": 1, "b": 2}',
    ),
    ("detectable_format:title", {}, "<<a poem>> of two lines", "<< >> of two lines"),
    (
        "combination:two_responses",
        {},
        "the first one******the second one",
        "the same one******the same one",
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say hello"},
        "say hello: hello there",
        "hello there, friend",
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Any questions?"},
        "That is all. any questions?",
        "Any questions? That is all.",
    ),
    ("startend:quotation", {}, '"three words here"', '"three" words here'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "a BIG RED fox",
        "a BIG red fox",
    ),
    ("change_case:english_capital", {}, "ALL OF IT", "ALL OF it"),
    ("change_case:english_lowercase", {}, "all of it", "All of it"),
    (
        "language:response_language",
        {"language": "de"},
        "Das ist ein kurzer Satz.",
        "This is a short sentence.",
    ),
    ("punctuation:no_comma", {}, "one two three", "one, two, three"),
    (
        "posttrain:repeat",
        {"word": "kpp", "count": 2, "separator": "-", "end": "#"},
        "kpp-kpp#",
        "kpp-kpp#kpp",
    ),
]


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), TABLE, ids=[row[0] for row in TABLE])
def test_what_follows_scores_exactly_1_and_what_does_not_0(
    name: str, kwargs: dict[str, Any], good: str, bad: str
) -> None:
    assert score(good, instruction_id_list=[name], kwargs=[kwargs]).reward == 1.0
    assert score(bad, instruction_id_list=[name], kwargs=[kwargs]).reward == 0.0


def test_every_check_is_in_the_table() -> None:
    assert {row[0] for row in TABLE} == set(CHECKS)


@pytest.mark.parametrize("name", sorted(CHECKS))
@pytest.mark.parametrize("response", ["", " ", "\n\n", "a", ".", "{}", "A B"])
def test_near_silence_follows_nothing(name: str, response: str) -> None:
    kwargs = next(row[1] for row in TABLE if row[0] == name)
    assert score(response, instruction_id_list=[name], kwargs=[kwargs]).reward == 0.0


@pytest.mark.parametrize(
    "response", ["kpp-kpp", "kpp-kpp# ", " kpp-kpp#", "kpp-kpp-kpp#", "KPP-kpp#", "kppkpp#"]
)
def test_repeat_is_exact(response: str) -> None:
    kwargs = {"word": "kpp", "count": 2, "separator": "-", "end": "#"}
    found = score(response, instruction_id_list=["posttrain:repeat"], kwargs=[kwargs])
    assert found.reward == 0.0


def test_all_instructions_must_hold() -> None:
    both = ["punctuation:no_comma", "change_case:english_lowercase"]
    assert score("no commas here", instruction_id_list=both, kwargs=[{}, {}]).reward == 1.0
    found = score("No commas here", instruction_id_list=both, kwargs=[{}, {}])
    assert found.reward == 0.0
    assert found.reason.startswith("change_case:english_lowercase")


def test_the_share_that_is_followed_is_told_and_not_rewarded() -> None:
    names = ["punctuation:no_comma", "change_case:english_lowercase", "startend:quotation"]
    found = score("no commas here", instruction_id_list=names, kwargs=[{}, {}, {}])
    assert (found.reward, found.terms) == (0.0, {"followed": 2 / 3})


@pytest.mark.parametrize(
    ("response", "strict", "loose"),
    [
        ('"all of it is quoted"', 1.0, 1.0),
        ('Sure, here it is:\n"all of it is quoted"', 0.0, 1.0),
        ('"all of it is quoted"\nAnything else?', 0.0, 1.0),
        ('Sure:\n**"all of it is quoted"**\nAnything else?', 0.0, 1.0),
        ("Sure:\nnothing is quoted\nAnything else?", 0.0, 0.0),
        ('Sure:\n\n"all of it is quoted"\nor\nnot?', 0.0, 0.0),
    ],
)
def test_loose_forgives_an_introduction_and_bold_type(
    response: str, strict: float, loose: float
) -> None:
    row: dict[str, Any] = {"instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    assert score(response, **row).reward == strict
    assert score(response, **row, loose=True).reward == loose


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "The weather is fine today and we go out."),
        ("hi", "यह हिंदी में लिखा गया है"),
        ("ru", "Это написано по-русски сегодня"),
        ("sw", "Hii ni sentensi ya Kiswahili kuhusu maisha"),
        ("pt", "Hoje n\u00e3o vamos sair porque est\u00e1 chovendo muito."),
    ],
)
def test_languages_are_told_apart(language: str, text: str) -> None:
    for asked in ("en", "hi", "ru", "sw", "pt"):
        row: dict[str, Any] = {"kwargs": [{"language": asked}]}
        found = score(text, instruction_id_list=["language:response_language"], **row)
        assert found.reward == float(asked == language)


def test_the_nulls_of_published_rows_are_no_arguments() -> None:
    kwargs: list[dict[str, Any] | None] = [{"keywords": None, "num_words": None}, None]
    names = ["punctuation:no_comma", "change_case:english_lowercase"]
    assert score("no commas here", instruction_id_list=names, kwargs=kwargs).reward == 1.0


@pytest.mark.parametrize(
    ("names", "kwargs", "message"),
    [
        (["keywords:existance"], [{}], "keywords:existence"),
        (["language:response_lang"], [{"language": "de"}], "posttrain:repeat"),
        (["keywords:existence"], [{}], "takes keywords in kwargs"),
        (["punctuation:no_comma"], [{"num_words": 3}], "takes nothing"),
        (["punctuation:no_comma"], [], "same length"),
        ([], [], "same length"),
        (
            ["length_constraints:number_words"],
            [{"num_words": 3, "relation": "more than"}],
            "at least",
        ),
        (["keywords:existence"], [{"keywords": [7]}], "cannot be checked"),
    ],
)
def test_bad_gold_is_an_error_that_names_the_remedy(
    names: list[str], kwargs: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        score("one two three four", instruction_id_list=names, kwargs=kwargs)


HOSTILE = ["[" * 50_000, "*" * 50_000, "*a" * 25_000, "<<" * 25_000, "a " * 25_000, "-\n" * 25_000]
MORE_HOSTILE = [
    "a" * 100_000,
    " \n" * 50_000 + "a",
    '"' * 50_000,
    "." * 50_000,
    "{" * 50_000,
    "\ud800",
]


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_every_response_is_checked_in_bounded_time(name: str) -> None:
    kwargs = next(row[1] for row in TABLE if row[0] == name)
    start = time.monotonic()
    for response in [*HOSTILE, *MORE_HOSTILE]:
        score(response, instruction_id_list=[name], kwargs=[kwargs], min_words=0)
    assert time.monotonic() - start < 2.0
