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
SUM = re.compile(r"= phi (?:<\d+ x )?(?:float|double)\b")
CHECK, ON_THE_WAY = "vector.memcheck", ("vector.ph", "vector.main", "vec.epilog", "vector.body")


def sums_by_layout(text: str) -> list[str]:
    """The blocks of a function's LLVM code that add floats up, and run or do not run by where the
    arrays are."""
    blocks, block = dict[str, list[str]](), list[str]()
    for line in text.splitlines():
        if label := LABEL.match(line):
            block = blocks.setdefault(label[1], [])
        block.append(line)
    after = [name for name in blocks if name.startswith(CHECK)]
    found = set[str]()
    while after:
        for name in TARGET.findall("\n".join(blocks[after.pop()])):
            if name.startswith(ON_THE_WAY) and name not in found:
                found.add(name)
                after.append(name)
    return sorted(name for name in found if SUM.search("\n".join(blocks[name])))
