"""Laws of what comes from the hub: what it cannot give is named before anything runs."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import HfApi, errors
from own_recipe import checked, message_of, write_recipe


def answer(status: int, code: str = "") -> Any:
    """The hub's, as huggingface_hub reads it."""
    headers = {"X-Error-Code": code} if code else {}
    return httpx.Response(status, headers=headers, request=httpx.Request("GET", "http://hub"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (errors.RepositoryNotFoundError("", response=answer(404)), "the hub has no {kind} 'a/b'"),
        (errors.GatedRepoError("", response=answer(403)), "is gated"),
        (errors.RevisionNotFoundError("", response=answer(404)), "no revision"),
        (errors.HFValidationError("bad"), "is no name on the hub"),
        (httpx.ConnectError("refused"), "was not downloaded before"),
        (None, None),
    ],
)
@pytest.mark.parametrize(
    ("kind", "field", "override"),
    [
        ("model", "base.hub", "base={hub: a/b}"),
        ("dataset", "domains.letters.data.hub", "domains.letters.data={hub: a/b}"),
    ],
)
def test_what_the_hub_cannot_give_is_named_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    field: str,
    override: str,
    given: Exception | None,
    said: str | None,
) -> None:
    def info(self: HfApi, name: str, **_: Any) -> None:
        assert name == "a/b"
        if given:
            raise given

    monkeypatch.setattr(HfApi, f"{kind}_info", info)
    path = write_recipe(tmp_path)
    if said is None:
        checked(path, override)
        return
    message = message_of(path, override)
    assert message.startswith(f"--set: {field}: ")
    assert said.format(kind=kind) in message


def test_what_was_downloaded_before_needs_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(HfApi, "model_info", info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models--a--b" / "snapshots").mkdir(parents=True)
    checked(write_recipe(tmp_path), "base={hub: a/b}")
