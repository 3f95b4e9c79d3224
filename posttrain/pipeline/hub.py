"""Is what a recipe takes from the Hugging Face hub there, and may this user have it?

Asked before anything runs, in seconds; where the hub cannot be reached, what was downloaded before
is looked for instead.
"""

from pathlib import Path
from typing import Literal

from posttrain.errors import CheckpointError, DataError

TIMEOUT_S = 3.0
"""How long the hub may take to answer."""

Kind = Literal["model", "dataset"]


def check_on_hub(kind: Kind, name: str, revision: str | None = None) -> None:
    """Ask the hub for a repository. Raises CheckpointError or DataError if it cannot be had."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if kind == "dataset" and Path(name).is_dir():  # `datasets` reads folders by the same call
        return
    failure = CheckpointError if kind == "model" else DataError
    try:
        api = HfApi()
        info = api.model_info if kind == "model" else api.dataset_info
        info(name, revision=revision, timeout=TIMEOUT_S)
    except GatedRepoError:
        raise failure(
            f"the hub's {name!r} is gated: ask for access on its page, and log in with `hf auth "
            "login`"
        ) from None
    except RevisionNotFoundError:
        raise failure(f"the hub's {name!r} has no revision {revision!r}: correct it") from None
    except RepositoryNotFoundError:
        raise failure(
            f"the hub has no {kind} {name!r}, or it is private: correct the name, or log in with "
            "`hf auth login`"
        ) from None
    except HFValidationError as error:
        raise failure(f"{name!r} is no name on the hub ({error}): write owner/name") from None
    except Exception as error:  # noqa: BLE001  # the HTTP client's, which change with its versions
        if not is_downloaded(kind, name):
            why = type(error).__name__
            raise failure(
                f"the hub cannot be reached ({why}), and {name!r} was not downloaded before: see "
                "to the network, or take it from a file"
            ) from None


def is_downloaded(kind: Kind, name: str) -> bool:
    """Whether the caches of huggingface_hub or datasets hold something of this name."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = [Path(HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"]
    if kind == "dataset":
        folders.append(Path(HF_DATASETS_CACHE) / name.replace("/", "___").lower())
    return any(folder.is_dir() for folder in folders)
