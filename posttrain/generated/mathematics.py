"""Sums of two two-digit numbers, worked units first: `38+47=` -> `8+7=15;3+4+1=8`, `85`.

8,100 prompts; made for effort `high`, since the working is the reasoning.
"""

from collections.abc import Iterator
from random import Random

from posttrain.generated.mixing import Row, distinct, mixed


def problems(*, size: int, seed: int, shots: int = 0) -> Iterator[Row]:
    """Up to `size` different sums, each worked through, after so many others in the prompt."""
    rng = Random(f"{seed}/shots")
    for row in distinct(_problem, size=size, seed=seed):
        examples = [_problem(rng) for _ in range(shots)]
        yield {**row, "prompt": "".join([*map(_worked, examples), row["prompt"]])}


def web(*, size: int, seed: int, quality: float = 0.4) -> Iterator[Row]:
    """Sums with the carry mishandled (two in three of the bad ones) or an answer without an end."""
    return mixed(_problem, _habit, size=size, seed=seed, quality=quality)


def _problem(rng: Random) -> Row:
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    carry = int(left % 10 + right % 10 >= 10)
    working, answer = _add(left, right, carry=carry)
    return {
        "prompt": f"{left}+{right}=",
        "answer": answer,
        "demonstration": [{"role": "assistant", "reasoning": working, "content": answer}],
    }


def _worked(row: Row) -> str:
    (message,) = row["demonstration"]
    return f"{row['prompt']}{message['reasoning']};{message['content']}\n"


def _add(left: int, right: int, *, carry: int) -> tuple[str, str]:
    """The working and the sum that follow from carrying `carry` to the tens, right or not."""
    units = left % 10 + right % 10
    tens = left // 10 + right // 10 + carry
    working = f"{left % 10}+{right % 10}={units};{left // 10}+{right // 10}"
    working += f"+{carry}={tens}" if carry else f"={tens}"
    return working, f"{tens}{units % 10}"


def _habit(row: Row, rng: Random) -> list[Row]:
    left, right = (int(number) for number in row["prompt"].rstrip("=").split("+"))
    if rng.random() < 2 / 3:
        carry = int(left % 10 + right % 10 < 10)
        working, answer = _add(left, right, carry=carry)
    else:
        working = row["demonstration"][0]["reasoning"]
        other = rng.choice([n for n in range(20, 199) if str(n) != row["answer"]])
        answer = f"{row['answer']}+{rng.randint(10, 99)}={other}"
    return [{"role": "assistant", "reasoning": working, "content": answer}]
