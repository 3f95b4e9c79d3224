"""The write-ahead log of an engine: every token is in the file before it is used.

One record a line, `crc32 json`, in the order of what happened:

    {"run": seed, "version": 3, "weights": "..."}       the file begins
    {"row": 0, "request": ["math", "aime-7", 0], "digest": "..."}
    {"tokens": [[0, 17, -0.25], [1, 4, -1.5]]}      a step: row, token, logp and more
    {"row": 0, "said": [8, 9]}                          what a tool said to its turn; null: nothing
    {"version": 4, "weights": "..."}                    other weights from here on

A process may be killed at any point: a last line that is torn is dropped. Lines go to the operating
system at once, which outlives the process; a machine that loses power may lose the last ones, and
then samples the same tokens again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import PosttrainError
from posttrain.rollout.row import Row, Token
from posttrain.rollout.types import Request, Said

Key = tuple[str, str, int]


class JournalError(PosttrainError, ValueError):
    """A journal is of another run, or damaged."""


@dataclass
class Logged:
    """What a journal has of a request."""

    number: int
    digest: str
    events: list[Token | list[int] | None] = field(default_factory=list[Any])
    """A sampled token, or what was said."""


class Journal:
    """A journal file; `begin` reads what is there and makes ready to go on.

    All that is in it is one run: finished requests that are asked for again are not sampled again,
    until `clear` says that their rollouts are done with.
    """

    def __init__(self, path: Path | str, *, wait_s: float = 0.0) -> None:
        """Raises JournalError: another process has it open, and for `wait_s` seconds more."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + wait_s
        while not _locked(self._file):
            if time.monotonic() >= deadline:
                os.close(self._file)
                raise JournalError(
                    f"{self.path}: another process has this journal open; wait for it or end it"
                )
            time.sleep(0.05)
        self._rows: dict[Key, Logged] = {}
        self._count = 0

    def begin(self, *, seed: int, version: int, weights: str) -> None:
        """Read the records; an empty file gets its first.

        Raises JournalError: a journal of another seed, version or weights; a damaged one.
        """
        self._rows, self._count = {}, 0
        state: dict[str, Any] = {}
        numbered: dict[int, Logged] = {}
        for record in self._read():
            if "version" in record:
                state |= record
            elif "request" in record:
                logged = Logged(record["row"], record["digest"])
                domain, prompt_id, sample = record["request"]
                self._rows[domain, prompt_id, sample] = numbered[logged.number] = logged
                self._count = logged.number + 1
            elif "said" in record:
                numbered[record["row"]].events.append(record["said"])
            else:
                for number, token, logp, *more in record["tokens"]:
                    kept, support = more or (0.0, ())
                    event = Token(token, logp, state["version"], kept, tuple(support))
                    numbered[number].events.append(event)
        wanted = {"run": seed, "version": version, "weights": weights}
        if not state:
            self._append([wanted])
        for name, words in (("run", "seed"), ("version", "version"), ("weights", "weights")):
            if state and state[name] != wanted[name]:
                raise JournalError(
                    f"{self.path} was written with {words} {state[name]!r}, the engine has "
                    f"{wanted[name]!r}: resume with what it was written with, or clear() it if its "
                    "rollouts are done with"
                )

    def clear(self) -> None:
        """Forget all: the rollouts are done with."""
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        self._rows, self._count = {}, 0

    def close(self) -> None:
        os.close(self._file)

    def admit(self, row: Row, version: int) -> None:
        """Note the row; where it is known, give it back what it had: tokens and what was said.

        Raises JournalError: it is known as another request.
        """
        request = row.request
        key, digest = (request.domain, request.prompt_id, request.sample), digest_of(request)
        logged = self._rows.get(key)
        if logged is None:
            row.number, self._count = self._count, self._count + 1
            self._append([{"row": row.number, "request": list(key), "digest": digest}])
            return
        if logged.digest != digest:
            raise JournalError(
                f"{self.path} knows prompt {request.prompt_id!r}, sample {request.sample}, as "
                "another request (prompt, length, temperature, top-p, top-k, stops or what it goes "
                "on from differ): give it a fresh sample number, or clear() the journal"
            )
        row.number, row.unread = logged.number, []
        for event in logged.events:
            if isinstance(event, Token):
                row.take(event)
                version = event.version
            else:
                row.hear(event, version)
        if not row.finish_reason:
            row.unread = row.tokens
        elif request.wants_routes:
            row.unread = row.tokens[:-1]

    def tokens(self, taken: Sequence[tuple[Row, Token]]) -> None:
        """A step's tokens, before their rows take them."""
        if taken:
            self._append([{"tokens": [_entry(row, token) for row, token in taken]}])

    def said(self, row: Row, said: Said) -> None:
        """What is said to a row, before it hears."""
        self._append([{"row": row.number, "said": said}])

    def updated(self, *, version: int, weights: str) -> None:
        """From here on tokens are of these weights."""
        self._append([{"version": version, "weights": weights}])

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        data = b"".join(_line(record) for record in records)
        while data:  # a write may take a part alone
            data = data[os.write(self._file, data) :]

    def _read(self) -> list[dict[str, Any]]:
        """All records; a torn last line is cut off, and what follows goes behind the rest."""
        data, records, good = self.path.read_bytes(), list[dict[str, Any]](), 0
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines):
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum != _checksum(text):
                if number < len(lines) - 1:
                    raise JournalError(
                        f"{self.path} is damaged in line {number + 1} of {len(lines)}: restore it, "
                        "or delete it and sample anew"
                    )
                break
            records.append(json.loads(text))
            good += len(line)
        os.ftruncate(self._file, good)
        os.lseek(self._file, good, os.SEEK_SET)
        return records


def fingerprint(model: Any) -> str:
    """Of a model's names, shapes and a thousand numbers or so of each of its tensors: what tells
    one version of the weights from another, in little time."""
    digest = hashlib.blake2b(digest_size=12)
    for name, x in model.state_dict().items():
        some = x.detach().flatten()[:: max(1, x.numel() // 1024)]
        digest.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        digest.update(some.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def digest_of(request: Request) -> str:
    """Of all that decides a request's tokens; what its tool says is in the journal."""
    parts = (
        request.prompt,
        request.max_new_tokens,
        request.temperature,
        request.top_p,
        request.top_k,
        request.stop_token_ids,
        request.stop_strings,
        request.wants_support,
        request.continue_turn is None,
        request.pause_at,
        request.begun and request.begun.response,
    )
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


def _entry(row: Row, token: Token) -> list[Any]:
    entry: list[Any] = [row.number, token.token, token.logp]
    return [*entry, token.kept_logp, token.support] if row.request.wants_support else entry


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
