"""Runs on the Hugging Face hub (extra ``hub``).

A run is fetched as ``hf:owner/name``, and published under that name. Only the safetensors and the
JSON of a run are transferred. Other files of a repository are not downloaded.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from equipoise.files import adopt

PREFIX = "hf:"
NEEDED = ("config.json", "model.safetensors", "aggregate.safetensors")
RUN_FILES = (*NEEDED, "held-out.safetensors", "metrics.jsonl", "evaluation.json")
LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"


class HubError(ValueError):
    """The hub refuses, lacks something or cannot be reached.

    The message says what to do.
    """


def run_folder(address: str | Path) -> Path:
    """Find the folder of a run, and download the run first if it is on the hub.

    A run on the hub is copied to ``runs/owner/name``, unless it is already there. The copy is a run
    like any other: its outputs are written into it, and it needs no network any more. It is never
    updated. To fetch the run anew, delete the copy.

    Args:
        address: A path, or "hf:owner/name", or "hf:owner/name@revision" for a branch, a tag or a
            commit.

    Returns:
        The folder.

    Raises:
        HubError: If the address is malformed, or the hub has no such run.
        ImportError: If the library of the extra ``hub`` is missing.

    Example:
        >>> run_folder("runs/mnist")
        PosixPath('runs/mnist')
    """
    if not str(address).startswith(PREFIX):
        return Path(address)

    name, _, revision = str(address).removeprefix(PREFIX).partition("@")
    check_name(name)

    folder = Path("runs", name)
    if revision:
        folder = Path("runs", f"{name}@{revision.replace('/', '-')}")

    if _lacks(folder):
        _download(name, revision or None, folder)

    return folder


def publish(name: str, files: Mapping[str, bytes | Path], *, private: bool = True) -> str:
    """Put files into a repository of models, in one commit.

    Args:
        name: "owner/name" of the repository. It is made if it does not exist.
        files: The content of each file, or the path of a local file, by name in the repository.
        private: Whether a new repository is visible to its owner only.

    Returns:
        The address of its page.

    Raises:
        HubError: If the name is malformed, no one is logged in, or the hub refuses.
        ImportError: If the library of the extra ``hub`` is missing.
    """
    check_name(name)
    with _explained(name):
        from huggingface_hub import CommitOperationAdd, HfApi, get_token

        if get_token() is None:
            raise HubError(f"nobody is logged in to the hub: {LOG_IN} to a token that may write.")

        api = HfApi()
        page = api.create_repo(name, private=private, exist_ok=True)

        additions = [
            CommitOperationAdd(path_in_repo=file, path_or_fileobj=content)
            for file, content in files.items()
        ]
        api.create_commit(name, additions, commit_message="Publish a run of equipoise")

    return str(page)


def _download(name: str, revision: str | None, folder: Path) -> None:
    """Copy the files of a run from the hub to a folder."""
    with _explained(name):
        from huggingface_hub import snapshot_download

        snapshot_download(name, revision=revision, local_dir=folder, allow_patterns=list(RUN_FILES))

    adopt(folder, RUN_FILES)
    missing = _lacks(folder)
    if missing:
        raise HubError(
            f"{name} on the hub is not a run of equipoise: it has no {', '.join(missing)}."
        )


def _lacks(folder: Path) -> list[str]:
    """The files of a run that a folder does not have."""
    return [file for file in NEEDED if not (folder / file).is_file()]


def check_name(name: str) -> None:
    """Refuse what is not the name of a repository.

    Args:
        name: Should be "owner/name".

    Raises:
        HubError: If it is something else.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise HubError(f"expected the name of a repository as owner/name, got {name!r}")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the errors of the client, or its absence, into messages that say what to do."""
    try:
        from httpx2 import TransportError  # the client does not wrap these errors
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise ImportError(
            "the Hugging Face hub needs its library: pip install 'equipoise[hub]'"
        ) from error

    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{name} is open only to those who asked: ask on its page, then {LOG_IN}."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"the hub has no model {name} that you may see: check the name, or {LOG_IN}."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(
            f"{name} has no such revision: give a branch, a tag or a commit that its page lists."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise HubError(
                f"the hub does not accept your token for {name}: {LOG_IN} to one that may write."
            ) from error

        raise HubError(
            f"the hub answered {status} for {name}: {error.server_message or error}"
        ) from error
    except (TransportError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise HubError(
            f"the hub cannot be reached for {name}: connect and unset HF_HUB_OFFLINE, or copy the "
            "run's folder here and give its path."
        ) from error
