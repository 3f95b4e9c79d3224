"""Rows from a file, the Hugging Face hub, reasoning-gym or a function of the user's."""

import difflib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

from posttrain.domains.config import DataConfig, SourceConfig
from posttrain.domains.mixing import mixed
from posttrain.domains.objects import import_object
from posttrain.domains.rows import Row, row_of, shown
from posttrain.errors import DataError

Placed = tuple[str, object]
"""A raw row after its place, for messages."""

ROWS_PER_BATCH = 1024
"""Rows of a Parquet file that are decoded at once."""


def load_rows(data: DataConfig, *, folder: Path, seed: int, most: int | None = None) -> list[Row]:
    """All rows of a source or the first `most`, in its order, duplicates included.

    Raises:
        DataError: naming the file, line, field, value and remedy.
        RecipeError: where `python` names no function.
    """
    return list(islice(stream_rows(data, folder=folder, seed=seed), most))


def stream_rows(data: DataConfig, *, folder: Path, seed: int) -> Iterator[Row]:
    """The same one by one: a row is read when it is asked for."""
    parts = [
        _rows(part, folder=folder, seed=seed, is_streamed=data.streaming) for part in data.parts
    ]
    return mixed(parts, data.shares) if data.mixture else parts[0]


def _rows(data: SourceConfig, *, folder: Path, seed: int, is_streamed: bool) -> Iterator[Row]:
    if data.jsonl is not None:
        raw, where = _jsonl(folder / data.jsonl), str(folder / data.jsonl)
    elif data.parquet is not None:
        raw, where = _parquet(folder / data.parquet), str(folder / data.parquet)
    elif data.hub is not None:
        raw, where = _hub(data, is_streamed=is_streamed), f"data set {data.hub!r}"
    elif data.reasoning_gym is not None:
        raw, where = _reasoning_gym(data.reasoning_gym, seed), data.source
    else:
        raw, where = _python(data, folder, seed), str(data.python)
    named = ((place, _renamed(row, data.columns, place)) for place, row in islice(raw, data.limit))
    if data.convert is not None:
        named = _converted(named, data.convert, folder)
    is_empty = True
    for place, row in named:
        is_empty = False
        yield row_of(row, where=place)
    if is_empty:
        raise DataError(f"{where} has no rows: needed is at least one, with a prompt")


def _renamed(row: object, columns: Mapping[str, str], where: str) -> object:
    """The row with `columns` (our name -> the data's) under our names."""
    if not columns or not isinstance(row, Mapping):
        return row
    fields: dict[str, Any] = dict(cast("Mapping[str, Any]", row))
    for ours, theirs in columns.items():
        if theirs not in fields:
            raise DataError(
                f"{where}: found the fields {', '.join(fields)}, needed {theirs!r}, which columns "
                f"calls {ours!r}: correct data.columns"
            )
    moved = {ours: fields[theirs] for ours, theirs in columns.items()}
    return {**{k: v for k, v in fields.items() if k not in columns.values()}, **moved}


def _converted(raw: Iterable[Placed], function: str, folder: Path) -> Iterator[Placed]:
    """What the function makes of each row, if it is not None."""
    convert = import_object(function, folder)
    for place, row in raw:
        try:
            made = convert(row)
        except Exception as error:
            raise DataError(
                f"{place}: {function} raised {type(error).__name__}: {error}; mend it or the row"
            ) from error
        if made is not None:
            yield place, made


def _check_file(path: Path, *, kind: str) -> None:
    if path.is_dir():
        raise DataError(f"{path}: this is a folder: name a {kind} file")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
        hint = f"did you mean {near[0]}?" if near else "paths are relative to the recipe"
        raise DataError(f"{path}: there is no such file; {hint}")


def _parquet(path: Path) -> Iterator[Placed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_file(path, kind="Parquet")
    try:
        number = 0
        for batch in cast("Any", pq.ParquetFile(path)).iter_batches(batch_size=ROWS_PER_BATCH):
            for row in batch.to_pylist():
                yield f"{path}, row {number}", {k: v for k, v in row.items() if v is not None}
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no whole Parquet file ({error}): save it again") from None


def _jsonl(path: Path) -> Iterator[Placed]:
    _check_file(path, kind="JSONL")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: found a byte that is no UTF-8 ({error.reason} at "
                    f"{error.start}): save the file as UTF-8"
                ) from None
            except (ValueError, RecursionError) as error:
                text = line.decode("utf-8", "replace").strip()
                raise DataError(
                    f"{where}: found {shown(text)}, which is no JSON ({error}): needed is one "
                    'object a line, such as {"prompt": "2+2=", "answer": "4"}'
                ) from None


def _hub(data: SourceConfig, *, is_streamed: bool) -> Iterator[Placed]:
    import datasets

    wanted = data.split or "train"
    try:
        rows: Any = datasets.load_dataset(
            str(data.hub), data.subset, split=wanted, streaming=is_streamed
        )
        for number, row in enumerate(cast("Iterable[object]", rows)):
            yield f"data set {data.hub!r}, {wanted} row {number}", row
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        raise DataError(
            f"data set {data.hub!r} (subset {data.subset}, split {wanted}) could not be loaded: "
            f"{type(error).__name__}: {message}; correct data.hub, subset or split, or see to the "
            "network; without one, save it as a file and use data.jsonl"
        ) from error


def _reasoning_gym(settings: Mapping[str, Any], seed: int) -> Iterator[Placed]:
    """The generator's questions and answers; its scoring, which runs text as code, is unused."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    config: dict[str, Any] = {"seed": seed, **settings}
    task = str(config.pop("task"))
    if task not in DATASETS:
        near = difflib.get_close_matches(task, list(DATASETS), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(DATASETS)}"
        raise DataError(f"reasoning_gym has no task {task!r}: {hint}")
    try:
        items = cast("Any", reasoning_gym.create_dataset(task, **config))
        for number, item in enumerate(items):
            metadata = json.loads(json.dumps(item["metadata"], default=str))
            row = {"prompt": item["question"], "answer": item["answer"], "metadata": metadata}
            yield f"reasoning_gym {task}, row {number}", row
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(
            f"reasoning_gym {task} refused {config}: {type(error).__name__}: {error}; correct the "
            "task's settings"
        ) from error


def _python(data: SourceConfig, folder: Path, seed: int) -> Iterator[Placed]:
    path = str(data.python)
    function = import_object(path, folder)
    try:
        parameters = inspect.signature(function).parameters
        args = {"seed": seed, **data.args} if "seed" in parameters else data.args
        rows = cast("Iterable[object]", function(**args))
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", row
    except Exception as error:
        raise DataError(
            f"{path} with arguments {data.args} raised {type(error).__name__}: {error}; mend it or "
            "correct data.args"
        ) from error
