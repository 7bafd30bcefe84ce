"""Adapters in repositories of the Hugging Face hub, or of a mirror that `HF_ENDPOINT` names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile, RepoFolder

from lora_serve.adapter_sources import AdapterLocation
from lora_serve.names import ARCHIVE, POOLING
from lora_serve.sources.remote_files import BLOCK, READ_SECONDS, RemoteFile, read_options


class HubFiles:
    """An adapter that is a repository, a folder in one or an archive in one, at one commit."""

    def __init__(self, location: AdapterLocation) -> None:
        options = {key: value for key, value in read_options(location.source).items() if key in ("endpoint", "token")}
        self._api, self._files = HfApi(**options), HfFileSystem(skip_instance_cache=True, **options)
        self._location = location
        organisation, repository, *folders = location.place.split("/")
        self._repository, self._path = f"{organisation}/{repository}", "/".join(folders)
        with _missing_is_not_found():
            info = self._api.repo_info(self._repository, revision=location.revision or None, timeout=READ_SECONDS)
        self.revision = str(info.sha)  # so that all files are of one commit, whatever is pushed meanwhile

    def list(self) -> dict[str, RemoteFile]:
        if self._location.is_archive:
            folder, _, name = self._path.rpartition("/")
            found = self._list(folder).get(name)
            return {} if found is None else {ARCHIVE: found}
        return self._list(self._path)

    @contextmanager
    def read(self, file: RemoteFile) -> Iterator[Iterator[bytes]]:
        path = f"{self._repository}@{self.revision}/{file.path}"
        with self._files.open(path, "rb", block_size=0) as opened:
            yield iter(lambda: opened.read(BLOCK), b"")

    def _list(self, folder: str) -> dict[str, RemoteFile]:
        """Files of a folder, and of the one with an adapter's pooling in it, by their path in the folder."""
        with _missing_is_not_found():
            entries = list(self._api.list_repo_tree(self._repository, folder or None, revision=self.revision))
        found: dict[str, RemoteFile] = {}
        for entry in entries:
            name = entry.path.rpartition("/")[2]
            if isinstance(entry, RepoFolder) and name == POOLING.partition("/")[0]:
                found |= {f"{name}/{path}": file for path, file in self._list(entry.path).items()}
            elif isinstance(entry, RepoFile):
                sha256 = "" if entry.lfs is None else entry.lfs.sha256
                found[name] = RemoteFile(entry.path, entry.size, entry.blob_id, sha256)
        return found


@contextmanager
def _missing_is_not_found() -> Iterator[None]:
    """Raise FileNotFoundError for a repository, revision or folder that is not there, or not for this token."""
    try:
        yield
    except GatedRepoError:  # it is there
        raise
    except HfHubHTTPError as error:
        if isinstance(error, RepositoryNotFoundError) or error.response.status_code == 404:
            raise FileNotFoundError from error
        raise
