"""Writing to the Hugging Face hub: a finished folder, or weight files one by one from the machines that made them.

Weight files of several machines go to a branch of their own. One commit then puts all of them on the main branch, beside the rest
of the folder. So nobody who loads the repository meets a part of it. Only public names of huggingface_hub are used.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qcli.checkpoint.hub import retried, translated
from qcli.errors import CheckpointError

_TRIES = 20  # of a commit that another machine's commit overtakes


def check_can_push(repo: str) -> None:
    """Raises HubError unless there is a token that the hub knows."""
    from huggingface_hub import HfApi

    with translated(repo, None):
        retried(lambda: HfApi().whoami())


def push(folder: Path, repo: str) -> str:
    """Uploads a finished folder to the model repository `repo` and returns its address. Creates the repository if missing."""
    from huggingface_hub import HfApi

    api = HfApi()
    with translated(repo, None):
        url = retried(lambda: api.create_repo(repo, repo_type="model", exist_ok=True))
        retried(lambda: api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload quantized model"))
    return str(url)


@dataclass(frozen=True)
class Branch:
    """A branch `name` of the model repository `repo`, for weight files that are not all there yet."""

    repo: str
    name: str

    def make(self) -> None:
        """Makes the repository and the branch where they are missing. Raises HubError."""
        from huggingface_hub import HfApi

        api = HfApi()
        with translated(self.repo, None):
            retried(lambda: api.create_repo(self.repo, repo_type="model", exist_ok=True))
            retried(lambda: api.create_branch(self.repo, branch=self.name, exist_ok=True))

    def add(self, path: Path) -> None:
        """Uploads a weight file. Several machines may do so at a time. Raises HubError."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        message = f"Add {path.name}"
        with translated(self.repo, self.name):
            for left in range(_TRIES - 1, -1, -1):
                try:
                    retried(
                        lambda: HfApi().upload_file(
                            path_or_fileobj=path,
                            path_in_repo=path.name,
                            repo_id=self.repo,
                            revision=self.name,
                            commit_message=message,
                        )
                    )
                    return
                except HfHubHTTPError as e:  # the bytes are there; the branch has moved on
                    if not left or e.response is None or e.response.status_code not in (409, 412):
                        raise

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of the weight files that are there. Raises HubError."""
        from huggingface_hub import HfApi

        with translated(self.repo, self.name):
            found = retried(lambda: HfApi().get_paths_info(self.repo, list(names), revision=self.name))
        return {each.path: each.size for each in found if hasattr(each, "size")}

    def publish(self, weights: dict[str, int], folder: Path, files: Iterable[str]) -> str:
        """Puts the weight files, given with their sizes, and `files` of `folder` on the main branch, in one commit, and drops the
        branch. The repository's address. Raises HubError, and CheckpointError for a weight file that is not there whole."""
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi

        there = self.sizes(weights)
        for name, size in weights.items():
            if there.get(name) != size:
                raise CheckpointError(
                    f"{name} has {there.get(name, 0):,} bytes on the branch {self.name} of {self.repo}, expected {size:,}",
                    "Run the same command again, which uploads it anew.",
                )
        copies = [CommitOperationCopy(name, name, src_revision=self.name) for name in weights]
        adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
        api = HfApi()
        with translated(self.repo, None):
            retried(lambda: api.create_commit(self.repo, [*copies, *adds], commit_message="Upload quantized model"))
            retried(lambda: api.delete_branch(self.repo, branch=self.name))
            return str(retried(lambda: api.create_repo(self.repo, repo_type="model", exist_ok=True)))
