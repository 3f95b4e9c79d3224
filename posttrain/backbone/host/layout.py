"""Whether a compiled loop's sums are the same wherever its arrays lie.

LLVM keeps a loop that writes while it adds up in two forms, in vectors and number by number, and
takes the second where the arrays might overlap: for that it looks at their addresses, past their
ends, too. The forms add up in different orders, so the same run would have other last bits once in
a thousand times. A loop that adds up and writes nothing has one form.
"""

from __future__ import annotations

import re

LABEL = re.compile(r'^"?([\w.$-]+)"?:')
TARGET = re.compile(r'label %"?([\w.$-]+)"?')
SUM = re.compile(r"= phi (?:<(?:vscale x )?\d+ x )?(?:float|double)\b")
NAME = re.compile(r'%"?([\w.$-]+)"?')
CHECK = re.compile(r"found\.conflict|conflict\.rdx|diff\.check")
"""What LLVM calls the comparison of two arrays' addresses, and several together."""
LOGIC = re.compile(r"(?:or|and|xor|select|freeze)\b.*\bi1\b")
ON_THE_WAY = ("vector.ph", "vector.main", "vec.epilog", "vector.body")


def sums_by_layout(text: str) -> list[str]:
    """The blocks of LLVM code that add floats up, and run or do not run by where arrays are."""
    return sorted(name for part in re.split(r"(?m)^define ", text) for name in _of_function(part))


def _of_function(text: str) -> set[str]:
    blocks, block = dict[str, list[str]](), list[str]()
    for line in text.splitlines():
        if label := LABEL.match(line):
            block = blocks.setdefault(label[1], [])
        block.append(line)
    checks, after, found = _checks(text), list[str](), set[str]()
    for line in text.splitlines():
        branch = line.strip().startswith("br i1 ")
        if branch and NAME.findall(line)[0] in checks:
            after.append(line)
    while after:
        for name in TARGET.findall(after.pop()):
            if name.startswith(ON_THE_WAY) and name not in found:
                found.add(name)
                after.append("\n".join(blocks[name]))
    return {name for name in found if SUM.search("\n".join(blocks[name]))}


def _checks(text: str) -> set[str]:
    """The names of comparisons of addresses, and of what is made of them: a check that is the same
    for all turns of an outer loop is made before it and asked later."""
    made = [line.strip().partition(" = ") for line in text.splitlines() if " = " in line]
    pairs = [(NAME.findall(name), value) for name, _, value in made]
    checks = {names[0] for names, _ in pairs if names and CHECK.search(names[0])}
    while True:
        more = {
            names[0]
            for names, value in pairs
            if names and LOGIC.match(value) and not checks.isdisjoint(NAME.findall(value))
        }
        if more <= checks:
            return checks
        checks |= more
