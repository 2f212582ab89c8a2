"""Exported folders on the Hugging Face Hub. The token comes from the environment, HF_TOKEN, and is written nowhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.errors import RunError, UserError, one_line

TOKEN = "HF_TOKEN"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_hub(repository: str) -> None:
    """Raises UserError unless the repository's name can be, and there is a token."""
    if not _REPOSITORY.fullmatch(repository) or len(repository) > 96:
        raise UserError(f"--push-to-hub {repository!r}: expected OWNER/NAME")
    if not os.environ.get(TOKEN):
        raise UserError(f"--push-to-hub needs a token with the right to write, in the environment variable {TOKEN}")


def push(folder: Path, repository: str, private: bool) -> str:
    """Uploads the files of a folder in one commit, into a repository that is made if there is none.

    Returns:
        The address of the commit.

    Raises:
        RunError: The Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    token = os.environ[TOKEN]
    api = HfApi(token=token, library_name="raydml")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by raydml")
    except Exception as error:  # the client's own errors, and those of its HTTP library
        reason = one_line(error).replace(token, "***")
        raise RunError(
            f"{repository} cannot be uploaded to the Hugging Face Hub ({reason}): the folder is written, upload it by `hf upload`"
        ) from error
    return str(done.commit_url)
