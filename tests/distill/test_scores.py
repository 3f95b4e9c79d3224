"""The scores of a running distillation, by hand."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from distill.scores import heldout_requests, sampled_scores
from posttrain.domains import DomainSpec
from posttrain.errors import DataError
from posttrain.rollout.types import Request, Rollout
from posttrain.tasks import Task
from posttrain.tokenizer import build_tokenizer


def make_task(name: str, folder: Path, *, num_rows: int = 12) -> Task:
    rows = [{"prompt": f"{name} {i}", "answer": str(i)} for i in range(num_rows)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec: dict[str, Any] = {"name": name, "data": {"jsonl": f"{name}.jsonl"}, "reward": "exact"}
    spec["heldout_share"] = 0.5
    return Task(DomainSpec.model_validate(spec), build_tokenizer(), folder=folder, seed=0)


class Knows:
    """In an engine's place: answers `right` prompts of every domain, the last to come first."""

    def __init__(self, right: dict[str, list[int]]) -> None:
        self.right = right

    def run(self, requests: list[Request]) -> Iterator[Rollout]:
        tokenizer: Any = build_tokenizer()
        for r in reversed(requests):
            text = tokenizer.decode(r.prompt, skip_special_tokens=True)
            number = int("".join(c for c in text if c.isdigit()))
            is_right = r.sample in self.right[r.domain]
            response = [*tokenizer.encode(str(number if is_right else -1)), tokenizer.eos_token_id]
            own = [True] * len(response)
            yield Rollout(r.prompt_id, r.domain, 0, r.prompt, response, own, [0.0] * len(own))


def test_a_score_is_the_mean_of_its_samples_and_the_macro_of_its_domains(tmp_path: Path) -> None:
    with closing(make_task("a", tmp_path)) as a, closing(make_task("b", tmp_path)) as b:
        tasks = {"a": a, "b": b}
        requests = heldout_requests(tasks, num_prompts=3, num_samples=4)
        assert {r.prompt_id for r in requests} == {r.id for t in (a, b) for r in t.heldout[:3]}
        engine: Any = Knows({"a": [0], "b": [0, 1, 2]})
        # one of a's four samples is right at every prompt, three of b's: (1/4 + 3/4) / 2
        wanted = {"score/a": 0.25, "score/b": 0.75, "score/macro": 0.5, "grader_failures": 0}
        assert sampled_scores(engine, requests, tasks) == wanted


def test_a_domain_without_a_heldout_prompt_is_named(tmp_path: Path) -> None:
    with closing(make_task("a", tmp_path, num_rows=1)) as task:
        task.heldout.clear()
        with pytest.raises(DataError, match="domain 'a' has no held-out prompt"):
            heldout_requests({"a": task}, num_prompts=3, num_samples=1)
