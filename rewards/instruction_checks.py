"""One function per verifiable instruction: what is wrong with the response, empty if nothing is.

Names, arguments and meanings are IFEval's (arXiv 2311.07911, table 1); `posttrain:repeat` is ours.
Sentences are counted by their end marks, not by nltk, and languages told by `rewards.languages`.
Every pattern runs in linear time, whatever the response.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence

from rewards.languages import language_of
from rewards.score import shown
from rewards.texts import miscount, paragraphs, sentences, words

Check = Callable[..., str]


def _occurrences(response: str, keyword: str) -> int:
    return response.lower().count(keyword.lower())


def existence(response: str, *, keywords: Sequence[str]) -> str:
    missing = [word for word in keywords if not _occurrences(response, word)]
    return f"without {', '.join(missing)}" if missing else ""


def frequency(response: str, *, keyword: str, frequency: int, relation: str) -> str:
    return miscount(f"times {keyword!r}", _occurrences(response, keyword), frequency, relation)


def forbidden_words(response: str, *, forbidden_words: Sequence[str]) -> str:
    whole = (rf"(?<!\w){re.escape(word)}(?!\w)" for word in forbidden_words)
    used = [w for w, p in zip(forbidden_words, whole, strict=True) if re.search(p, response, re.I)]
    return f"with {', '.join(used)}" if used else ""


def letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str) -> str:
    return miscount(
        f"letters {letter!r}", _occurrences(response, letter), let_frequency, let_relation
    )


def number_words(response: str, *, num_words: int, relation: str) -> str:
    return miscount("words", len(words(response)), num_words, relation)


def number_sentences(response: str, *, num_sentences: int, relation: str) -> str:
    return miscount("sentences", len(sentences(response)), num_sentences, relation)


def number_paragraphs(response: str, *, num_paragraphs: int) -> str:
    parts = paragraphs(response)
    if not all(parts[1:-1]):
        return "an empty paragraph"
    return miscount("paragraphs", sum(map(bool, parts)), num_paragraphs)


def nth_paragraph_first_word(
    response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> str:
    parts = [part for part in paragraphs(response, "\n\n") if part]
    if problem := miscount("paragraphs", len(parts), num_paragraphs):
        return problem
    words = parts[nth_paragraph - 1].split() if 0 < nth_paragraph <= len(parts) else []
    first = words[0].strip("\"'.,?!").lower() if words else ""
    if first == first_word.lower():
        return ""
    return f"paragraph {nth_paragraph} begins with {shown(first)}, needed {first_word!r}"


def number_placeholders(response: str, *, num_placeholders: int) -> str:
    found = re.findall(r"\[[^\[\]\n]*\]", response)
    return miscount("placeholders", len(found), num_placeholders, "at least")


def postscript(response: str, *, postscript_marker: str) -> str:
    return "" if _occurrences(response, postscript_marker) else f"no {postscript_marker}"


def number_bullet_lists(response: str, *, num_bullets: int) -> str:
    found = re.findall(r"^[ \t]*(?:\*[^*\n]|-)", response, re.MULTILINE)
    return miscount("bullets", len(found), num_bullets)


def constrained_response(response: str) -> str:
    options = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    return "" if any(option in response for option in options) else f"none of {', '.join(options)}"


def number_highlighted_sections(response: str, *, num_highlights: int) -> str:
    found = [text for text in re.findall(r"\*\*?([^\n*]+)\*\*?", response) if text.strip()]
    return miscount("highlighted sections", len(found), num_highlights, "at least")


def multiple_sections(response: str, *, section_spliter: str, num_sections: int) -> str:
    found = re.findall(rf"{re.escape(section_spliter)}\s?\d+", response)
    return miscount("sections", len(found), num_sections, "at least")


def json_format(response: str) -> str:
    text = response.strip()
    fence = re.match(r"```(?:json)?\s", text, re.IGNORECASE)
    if fence and text.endswith("```"):
        text = text[fence.end() : -3]
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {str(error)[:80]}"
    return ""


def title(response: str) -> str:
    found = re.findall(r"<<([^<>\n]+)>>", response)
    return "" if any(text.strip() for text in found) else "no <<title>>"


def two_responses(response: str) -> str:
    parts = paragraphs(response, "******")
    inner = parts[(not parts[0]) : len(parts) - (not parts[-1])]
    if len(inner) != 2 or not all(inner):
        return f"{len(inner)} responses between ******, needed 2"
    return "" if inner[0] != inner[1] else "twice the same response"


def repeat_prompt(response: str, *, prompt_to_repeat: str) -> str:
    starts = response.strip().lower().startswith(prompt_to_repeat.strip().lower())
    return "" if starts else "does not begin with the request"


def end_checker(response: str, *, end_phrase: str) -> str:
    text = response.strip().strip('"').lower()
    return "" if text.endswith(end_phrase.strip().lower()) else f"ends with {shown(text[-30:])}"


def quotation(response: str) -> str:
    text = response.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return "" if is_quoted else "not in double quotation marks"


def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: str) -> str:
    found = [word for word in words(response) if word.isupper()]
    return miscount("words in capitals", len(found), capital_frequency, capital_relation)


def english_capital(response: str) -> str:
    return "" if response.isupper() else "not all in capitals"


def english_lowercase(response: str) -> str:
    return "" if response.islower() else "not all in lower case"


def response_language(response: str, *, language: str) -> str:
    found = language_of(response)
    return "" if found == language else f"in {found!r}, needed {language!r}"


def no_comma(response: str) -> str:
    return "a comma" if "," in response else ""


def repeat(response: str, *, word: str, count: int, separator: str = " ", end: str = "") -> str:
    wanted = separator.join([word] * count) + end
    return "" if response == wanted else f"{shown(response)}, needed {shown(wanted)}"


CHECKS: Mapping[str, Check] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "length_constraints:number_words": number_words,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
    "language:response_language": response_language,
    "posttrain:repeat": repeat,
}


def arguments_of(check: Check) -> tuple[set[str], set[str]]:
    """The kwargs a check needs, and all that it takes."""
    options = list(inspect.signature(check).parameters.values())[1:]
    required = {option.name for option in options if option.default is option.empty}
    return required, {option.name for option in options}
