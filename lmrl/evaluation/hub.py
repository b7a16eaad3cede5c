"""Pushing an export to the Hugging Face hub, with the token in HF_TOKEN or the one that `hf auth login` has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmrl.errors import RunError
from lmrl.local_names import HUB_NAME
from lmrl.secrets import redact


def prepare(repository: str, private: bool = False) -> Any:
    """Create the repository on the hub if it does not exist, before anything is exported; returns the hub's API.

    repository: OWNER/NAME. Raises RunError: no token, no permission, no network.
    """
    from huggingface_hub import HfApi

    if "/" not in repository or not HUB_NAME.fullmatch(repository):
        raise RunError(f"--push: '{repository}' is not a hub name: expected OWNER/NAME")
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
    except Exception as error:  # a fault of the network, the hub or the token
        raise RunError(_reason(repository, error)) from error
    return api


def push(api: Any, folder: Path, repository: str) -> str:
    """Upload an exported folder in one commit; returns its address. Raises RunError in one line."""
    try:
        info = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by lmrl export")
    except Exception as error:
        raise RunError(f"{_reason(repository, error)}; the export itself is in {folder}") from error
    return str(getattr(info, "repo_url", info))


def _reason(repository: str, error: Exception) -> str:
    reason = redact(" ".join(str(error).split()))[:300] or type(error).__name__
    hint = " (set HF_TOKEN to a token that may write there)" if "401" in reason or "403" in reason else ""
    return f"--push {repository}: {reason}{hint}"
