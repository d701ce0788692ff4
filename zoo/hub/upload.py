"""A publication becomes one commit. Large files go ahead of it, by their hash: what has arrived is not sent again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo

from zoo.checkpoint import read_json
from zoo.hub.card import TAG
from zoo.hub.publication import Publication, is_of_checkpoint


def publish(publication: Publication, private: bool = False, force: bool = False) -> CommitInfo:
    """Publish in one commit; until it is there the repository stays as it was.

    An upload that was interrupted goes on when called again: files that arrived whole are not sent twice.

    Args:
        publication: of `prepare`.
        private: create the repository so that only its owners see it.
        force: replace everything in the repository, whatever it holds. Otherwise it must be empty or hold an earlier
            publication of the same model type, whose files are replaced; what others put beside them stays.

    Raises:
        ValueError: if there is no token; if the repository holds something else, or is public and shall be private; if
            the Hub refuses or the connection breaks.
    """
    if get_token() is None:
        raise ValueError("publishing needs a token that may write: run `hf auth login`, or set HF_TOKEN")
    api, repo_id = HfApi(), publication.repo_id
    with _explained(repo_id):
        try:
            found = api.model_info(repo_id)
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private or None)  # None: as is the default of its owner
            found = api.model_info(repo_id)
        if private and not found.private:
            raise ValueError(f"{repo_id} is there already, and public: make it private in its settings first")
        there = {file.rfilename for file in found.siblings} - {".gitattributes"}
        if not force:
            _check_holdings(publication, found, there)
        stale = (name for name in sorted(there - publication.sizes.keys()) if force or is_of_checkpoint(name))
        operations = [
            *map(CommitOperationDelete, stale),
            *(CommitOperationAdd(name, path) for name, path in publication.files.items()),
            CommitOperationAdd("README.md", str(publication.card).encode()),
        ]
        return api.create_commit(
            repo_id, operations, commit_message=publication.commit_message, parent_commit=found.sha
        )


def _check_holdings(publication: Publication, found: ModelInfo, there: set[str]) -> None:
    """Raise ValueError unless the repository is empty or holds an earlier publication of the same model type."""
    if not there:
        return
    repo_id, held = publication.repo_id, f"{len(there)} files"
    if {"README.md", "config.json"} <= there:
        card, config = (
            Path(hf_hub_download(repo_id, name, revision=found.sha)) for name in ("README.md", "config.json")
        )
        model_type = read_json(config).get("model_type")
        is_ours = TAG in (ModelCard.load(card).data.tags or ())
        if is_ours and model_type == publication.model_type:
            return
        held = f"a {model_type}" + ("" if is_ours else " that `zoo publish` did not put there")
    raise ValueError(
        f"{repo_id} holds something else than a {publication.model_type}: {held}; choose another name, or --force "
        "replaces all of it"
    )


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what the Hub or the connection raises into one line that says how to go on."""
    try:
        yield
    except ValueError:  # ours, or of the Hub's check of the card, in words already
        raise
    except Exception as error:  # of three libraries, which have no class in common
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        refused = isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403)
        way_out = (
            "the token may not write there: `hf auth login` with another, or choose another name"
            if refused
            else "the same command goes on from what has arrived"
        )
        said = " ".join(str(cause).split())
        raise ValueError(f"{repo_id} was not published: {type(cause).__name__}: {said}; {way_out}") from error
