"""IFBench's verifiable instructions (arXiv 2507.02833), in the form of `instruction_checks`.

Names, arguments and meanings are IFBench's, but for two things: words and sentences are cut by
`rewards.texts`, not by nltk, and where IFBench's check passes what breaks the instruction's own
words (a bullet without a sub-bullet's line, say), the words count. Left out: instructions with one
fixed factual answer (`custom:*`), and those that need a tagger or a dictionary of syllables.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from rewards.score import shown
from rewards.texts import STRIPPED, bare_words, miscount, sentences, words

CONJUNCTIONS = frozenset(words("and but for nor or so yet"))
PRONOUNS = frozenset(
    words(
        "i me we us you he him she her it they them my mine our ours your yours his hers its "
        "their theirs myself ourselves yourself yourselves himself herself itself themselves "
        "this that these those who whom whose which what whoever whomever whatever whichever "
        "anybody anyone anything everybody everyone everything nobody nothing somebody someone "
        "something each either neither both all some any none"
    )
)
STOP_WORDS = PRONOUNS | frozenset(
    words(
        "a an the am is are was were be been being have has had having do does did doing and "
        "but if or because as until while of at by for with about against between into through "
        "during before after above below to from up down in out on off over under again further "
        "then once here there when where why how few more most other such no nor not only own "
        "same so than too very can will just should now would could don didn doesn isn aren "
        "wasn weren won t s d ll m o re ve y ain couldn hadn hasn haven mustn needn shan "
        "shouldn wouldn"
    )
)
NAMES = frozenset(
    words(
        "Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte "
        "Alexander Amelia Benjamin Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen "
        "Abigail Gabriel Ella Jacob Scarlett Nathan Victoria Elijah Layla Nicholas Audrey David "
        "Hannah Christopher Penelope Thomas Nora Andrew Aria Joseph Claire Ryan Stella Jonathan"
    )
)
PRIMES = frozenset(n for n in range(2, 100) if all(n % k for k in range(2, n)))
EMOJI = re.compile("[\u2190-\u21ff\u231a-\u23ff\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]")
JOINERS = "\u200d\ufe0f"
"""Between and behind the parts of one emoji."""


def word_count_range(response: str, *, min_words: int, max_words: int) -> str:
    found = len(words(response))
    return "" if min_words <= found <= max_words else f"{found} words"


def unique_word_count(response: str, *, N: int) -> str:
    return miscount("different words", len(set(bare_words(response))), N, "at least")


def stop_words(response: str, *, percentage: float) -> str:
    found = words(response.lower())
    share = 100 * sum(word in STOP_WORDS for word in found) / max(1, len(found))
    return "" if found and share <= percentage else f"{share:.0f}% stop words"


def _ends(response: str) -> Counter[str]:
    """How many sentences end with each mark."""
    return Counter(sentence.rstrip("\"')]")[-1:] for sentence in sentences(response))


def sentence_type(response: str) -> str:
    ends = _ends(response)
    holds = ends["?"] > 0 and ends["."] == 2 * ends["?"]
    return "" if holds else f"{ends['.']} declarative against {ends['?']} interrogative sentences"


def sentence_balance(response: str) -> str:
    ends = _ends(response)
    holds = ends["."] == ends["?"] == ends["!"] > 0
    return "" if holds else f"{ends['.']} declarative, {ends['?']} asked, {ends['!']} exclaimed"


def conjunctions(response: str, *, small_n: int) -> str:
    found = CONJUNCTIONS.intersection(bare_words(response))
    return miscount("different conjunctions", len(found), small_n, "at least")


def person_names(response: str, *, N: int) -> str:
    return miscount("names", len(NAMES.intersection(words(response))), N, "at least")


def overlap(response: str, *, reference_text: str, percentage: float) -> str:
    def trigrams(text: str) -> set[tuple[str, ...]]:
        parts = re.findall(r"\w+|[^\w\s]", text)
        return set(zip(parts, parts[1:], parts[2:], strict=False))

    found = trigrams(response)
    share = 100 * len(found & trigrams(reference_text)) / max(1, len(found))
    return "" if found and abs(share - percentage) <= 2 else f"{share:.0f}% of trigrams shared"


def _without_punctuation(response: str) -> str:
    return response.translate(str.maketrans("", "", string.punctuation))


def numbers(response: str, *, N: int) -> str:
    return miscount("numbers", len(re.findall(r"\d+", _without_punctuation(response))), N)


def alphabet(response: str) -> str:
    initials = [word[0] for word in bare_words(response)]
    if not initials or any(letter not in string.ascii_lowercase for letter in initials):
        return "a word that begins with no letter"
    for before, after in pairwise(initials):
        if (ord(after) - ord(before)) % 26 != 1:
            return f"{after!r} after {before!r}"
    return ""


def vowel(response: str) -> str:
    if "\n" in response.strip():
        return "more than one paragraph"
    return miscount("vowels", len(set("aeiou") & set(response.lower())), 3, "at most")


def consonants(response: str) -> str:
    for word in bare_words(response):
        if not re.search("[bcdfghjklmnpqrstvwxyz]{2}", word):
            return f"no cluster in {shown(word)}"
    return ""


def alliteration_increment(response: str) -> str:
    before = -1
    for sentence in sentences(response):
        same = [a[0] == b[0] for a, b in pairwise(bare_words(sentence))]
        runs = sum(is_same and not was for was, is_same in pairwise([False, *same]))
        alliterative = sum(same) + runs
        if alliterative <= before:
            return f"{alliterative} alliterative words after {before}"
        before = alliterative
    return ""


def palindrome(response: str) -> str:
    found = [w for w in bare_words(_without_punctuation(response)) if len(w) > 4 and w == w[::-1]]
    return miscount("palindromes", len(found), 10, "at least")


def punctuation(response: str) -> str:
    interrobang = re.search("\\?!|!\\?|\u203d", response)
    if not interrobang:
        return "no interrobang"
    rest = response[: interrobang.start()] + response[interrobang.end() :]
    missing = [mark for mark in ".,!?;:" if mark not in rest]
    return f"without {' '.join(missing)}" if missing else ""


def parentheses(response: str) -> str:
    pairs = {")": "(", "]": "[", "}": "{"}
    opened: list[str] = []
    deepest = 0
    for character in response:
        if character in pairs.values():
            opened.append(character)
            deepest = max(deepest, len(opened))
        elif character in pairs:
            if not opened or opened.pop() != pairs[character]:
                opened, deepest = [], 0
            elif deepest - len(opened) >= 5:
                return ""
    return "not nested 5 deep"


def quotes(response: str) -> str:
    # An apostrophe within a word is no quotation mark.
    marks = re.sub(r"(?<=\w)'(?=\w)", "", response)
    opened: list[str] = []
    deepest = 0
    for mark in re.findall("[\"']", marks):
        if opened and opened[-1] == mark:
            opened.pop()
            if deepest - len(opened) >= 3:
                return ""
        else:
            opened.append(mark)
            deepest = max(deepest, len(opened))
    return "not nested 3 deep"


def prime_lengths(response: str) -> str:
    for word in bare_words(_without_punctuation(response)):
        if len(word) not in PRIMES:
            return f"{shown(word)} has {len(word)} letters"
    return ""


def options(response: str, *, options: str) -> str:
    separator = "/" if "/" in options else " or " if " or " in options else ","
    allowed = [option.strip() for option in options.split(separator)]
    if re.match(r"\W*a\W*b\W*c", options, re.IGNORECASE):  # letters: as they are written
        return "" if response.strip() in allowed else f"{shown(response)} is none of {allowed}"
    plain = [option.strip(STRIPPED).lower() for option in allowed]
    found = response.strip(STRIPPED).lower()
    return "" if found in plain else f"{shown(response)} is none of {allowed}"


def newline(response: str) -> str:
    lines = [line for line in _without_punctuation(response).splitlines() if line.strip()]
    crowded = [line for line in lines if len(line.split()) > 1]
    return f"{shown(crowded[0])} is more than a word" if crowded else ""


def emoji(response: str) -> str:
    # An emoji may stand before the end mark, or behind it and then before the next sentence.
    parts = sentences(response)
    for sentence, following in pairwise([*parts, ""]):
        end = sentence.translate(str.maketrans("", "", JOINERS)).rstrip(STRIPPED)[-1:]
        start = following[:1]
        if not EMOJI.fullmatch(end) and not (start and EMOJI.fullmatch(start)):
            return f"no emoji at the end of {shown(sentence)}"
    return ""


def sentence_words(response: str) -> str:
    parts = sentences(response)
    if problem := miscount("sentences", len(parts), 3):
        return problem
    if len({len(part.strip()) for part in parts}) > 1:
        return "sentences of different lengths"
    return repeats(response, small_n=1)


def repeats(response: str, *, small_n: int) -> str:
    common = Counter(_without_punctuation(response).lower().split()).most_common(1)
    return miscount(f"times {common[0][0]!r}", common[0][1], small_n, "at most") if common else ""


def sentence_keyword(response: str, *, word: str, N: int) -> str:
    parts = sentences(response)
    found = 0 < N <= len(parts) and re.search(
        rf"(?<!\w){re.escape(word)}(?!\w)", parts[N - 1], re.IGNORECASE
    )
    return "" if found else f"no {word!r} in sentence {N} of {len(parts)}"


def pronouns(response: str, *, N: int) -> str:
    found = sum(word in PRONOUNS for word in words(response.lower()))
    return miscount("pronouns", found, N, "at least")


def last_first(response: str) -> str:
    for before, after in pairwise(bare_words(part) for part in sentences(response)):
        if not before or not after or before[-1] != after[0]:
            return "a sentence that does not begin with the last one's last word"
    return ""


def paragraph_last_first(response: str) -> str:
    for line in response.split("\n"):
        found = bare_words(line)
        if found and found[0] != found[-1]:
            return f"a paragraph from {found[0]!r} to {found[-1]!r}"
    return ""


def sentence_increment(response: str, *, small_n: int) -> str:
    counts = [len(bare_words(part)) for part in sentences(response)]
    wrong = [f"{b} words after {a}" for a, b in pairwise(counts) if b != a + small_n]
    return wrong[0] if wrong else ""


def no_consecutive(response: str) -> str:
    for before, after in pairwise(_without_punctuation(response).lower().split()):
        if before[0] == after[0]:
            return f"{before!r} before {after!r}"
    return ""


def line_indent(response: str) -> str:
    lines = [line for line in response.split("\n") if line.strip()]
    indents = [len(line) - len(line.lstrip(" ")) for line in lines]
    falls = any(after <= before for before, after in pairwise(indents))
    return "a line that is not indented further" if falls else ""


def quote_unquote(response: str) -> str:
    text = "".join(response.replace("\u201c", '"').replace("\u201d", '"').split())
    if '""' in text:
        return "a quotation right behind another"
    ends = text.rstrip(string.digits + string.punctuation.replace('"', ""))
    return "a quotation at the end" if ends.endswith('"') else ""


def special_list(response: str, *, sep: str) -> str:
    items = [line for line in response.split("\n") if line.strip().startswith(sep)]
    return miscount(f"items that begin with {sep!r}", len(items), 2, "at least")


def thesis(response: str) -> str:
    found = re.search(r"<(i|em)>([^<]*)</\1>(.*)", response, re.DOTALL)
    is_there = found is not None and found[2].strip() and found[3].strip()
    return "" if is_there else "no thesis in italics with a text behind it"


def sub_bullets(response: str) -> str:
    marks = re.findall(r"^[ \t]*([*-])(?=[ \t])", response, re.MULTILINE)
    joined = "".join(marks)
    if "*" not in joined:
        return "no bullet"
    return "a bullet without a sub-bullet" if re.search(r"\*(?!-)", joined) else ""


def no_bullets_bullets(response: str) -> str:
    lines = [line.strip() for line in response.split("\n") if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.startswith("*")), len(lines))
    told = sum(part.endswith(".") for part in sentences("\n".join(lines[:first])))
    bullets = sum(line.startswith("*") for line in lines[first:])
    if bullets < len(lines) - first:
        return "text behind the bullets"
    return miscount("sentences", told, 2, "at least") or miscount("bullets", bullets, 2, "at least")


def keywords_multiple(
    response: str, *, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str
) -> str:
    asked = zip((keyword1, keyword2, keyword3, keyword4, keyword5), (1, 2, 3, 5, 7), strict=True)
    for keyword, count in asked:
        whole = rf"(?<!\w){re.escape(keyword.strip())}(?!\w)"
        found = len(re.findall(whole, response, re.IGNORECASE))
        if problem := miscount(f"times {keyword!r}", found, count):
            return problem
    return ""


def keyword_specific_position(response: str, *, keyword: str, n: int, m: int) -> str:
    parts = sentences(response)
    found = bare_words(parts[n - 1]) if 0 < n <= len(parts) else []
    is_there = 0 < m <= len(found) and found[m - 1] == keyword.strip().lower()
    return "" if is_there else f"word {m} of sentence {n} is not {keyword!r}"


def words_position(response: str, *, keyword: str) -> str:
    found = bare_words(response)
    is_there = len(found) > 1 and found[1] == found[-2] == keyword.strip().lower()
    return "" if is_there else f"the second and the last but one are not both {keyword!r}"


def repeat_change(response: str, *, prompt_to_repeat: str) -> str:
    given, found = prompt_to_repeat.split(), response.split()
    if not given or given[1:] != found[1:] or len(given) != len(found):
        return "does not repeat the request"
    return "the first word is unchanged" if given[0] == found[0] else ""


def repeat_span(response: str, *, prompt_to_repeat: str, n_start: int, n_end: int) -> str:
    span = prompt_to_repeat.split()[n_start : n_end + 1]
    is_same = response.lower().split() == [word.lower() for word in span]
    return "" if is_same else f"{shown(response)}, needed {shown(' '.join(span))}"


def title_case(response: str) -> str:
    for word in words(response):
        if word[0].islower() and (len(word) == 1 or word[1:].islower() or word[1:].isupper()):
            return f"{word!r} is not capitalized"
    return ""


def output_template(response: str) -> str:
    heads = ("My Answer:", "My Conclusion:", "Future Outlook:")
    places = [response.find(head) for head in heads]
    return "" if -1 < places[0] < places[1] < places[2] else "not in the template"


def no_whitespace(response: str) -> str:
    return "white space" if any(map(str.isspace, response)) else ""


CHECKS: Mapping[str, Callable[..., str]] = {
    "count:word_count_range": word_count_range,
    "count:unique_word_count": unique_word_count,
    "count:conjunctions": conjunctions,
    "count:person_names": person_names,
    "count:numbers": numbers,
    "count:punctuation": punctuation,
    "count:pronouns": pronouns,
    "count:keywords_multiple": keywords_multiple,
    "ratio:stop_words": stop_words,
    "ratio:sentence_type": sentence_type,
    "ratio:sentence_balance": sentence_balance,
    "ratio:sentence_words": sentence_words,
    "ratio:overlap": overlap,
    "words:alphabet": alphabet,
    "words:vowel": vowel,
    "words:consonants": consonants,
    "words:palindrome": palindrome,
    "words:prime_lengths": prime_lengths,
    "words:repeats": repeats,
    "words:last_first": last_first,
    "words:paragraph_last_first": paragraph_last_first,
    "words:no_consecutive": no_consecutive,
    "words:keywords_specific_position": keyword_specific_position,
    "words:words_position": words_position,
    "sentence:alliteration_increment": alliteration_increment,
    "sentence:keyword": sentence_keyword,
    "sentence:increment": sentence_increment,
    "format:parentheses": parentheses,
    "format:quotes": quotes,
    "format:options": options,
    "format:newline": newline,
    "format:emoji": emoji,
    "format:line_indent": line_indent,
    "format:quote_unquote": quote_unquote,
    "format:list": special_list,
    "format:thesis": thesis,
    "format:sub-bullets": sub_bullets,
    "format:no_bullets_bullets": no_bullets_bullets,
    "format:title_case": title_case,
    "format:output_template": output_template,
    "format:no_whitespace": no_whitespace,
    "repeat:repeat_change": repeat_change,
    "repeat:repeat_span": repeat_span,
}

ONE_WORD: Sequence[str] = ("format:options", "format:no_whitespace", "repeat:repeat_span")
"""Instructions that a single word may follow."""
