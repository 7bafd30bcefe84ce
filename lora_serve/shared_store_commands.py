"""The `lora-serve store clean-shared` command, which works on a store that replicas share, beside them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field
from pydantic_settings import CliPositionalArg

from lora_serve import reports
from lora_serve.config import parse_shared_store


def _check_url(url: str) -> str:
    parse_shared_store(url)
    return url


SharedStoreURL = Annotated[str, AfterValidator(_check_url)]


class CleanSharedCommand(BaseModel):
    """Remove files of a shared store that no adapter's version needs any more. Replicas may run meanwhile."""

    url: CliPositionalArg[SharedStoreURL] = Field(description="as in --shared-store")
    grace: float = Field(24.0, ge=1.0, description="hours that a file must be old: longer than any upload takes")
    dry_run: bool = Field(False, description="print what would be removed, and remove nothing")

    def run(self) -> None:
        """Execute the command. Raises: `ServeError`."""
        from lora_serve.adapters.shared.cleaning import clean  # here: the library of buckets is an extra
        from lora_serve.adapters.shared.shared_location import open_objects

        keys: list[str] = []
        count = clean(open_objects(self.url), self.grace * 3600, remove=not self.dry_run, found=keys.append)
        reports.print_lines(keys)
        would_be = "would be removed" if self.dry_run else "removed"
        reports.print_lines([f"{reports.count(count, 'file')} {would_be} from {self.url}"])
