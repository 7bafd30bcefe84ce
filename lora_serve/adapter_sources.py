"""Sources of adapters: which ones the operator named, and where in one an adapter is.

A source is a URL with one place for the adapter's name. Names and paths from requests are put there and cannot lead
anywhere else: no segment of a path is empty, "." or "..", or has a character that means something in a URL.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec

from lora_serve.errors import BadRequest
from lora_serve.names import NAME_PATTERN, shorten

SCHEMES = ("file", "hf", "s3", "gs", "https", "http")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
PLACE = "{name}"
_SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,127}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DEEPEST = 8  # segments of a path in a source


class AdapterLocation(msgspec.Struct, frozen=True):
    """Where an adapter is: a folder, or an archive.

    Attributes:
        source: name of the source.
        scheme: one of `SCHEMES`.
        place: what follows the scheme; for hf, repository and folder in it.
        root: for file, the folder that nothing may lead out of.
        revision: for hf, a branch, tag or commit; empty for the default branch.
        path: in the source; a plain name for what is fetched on demand.
    """

    source: str
    scheme: str
    place: str
    path: str
    root: str = ""
    revision: str = ""

    @property
    def label(self) -> str:
        """The source's name and the path in it, for logs and records."""
        return f"{self.source}/{self.path}"

    @property
    def is_archive(self) -> bool:
        return self.place.endswith(ARCHIVES)


class NamedSource(msgspec.Struct, frozen=True):
    """A named source.

    Attributes:
        template: what follows the scheme, with `{name}` in place of the adapter's name.
        revision: as in `AdapterLocation`.
    """

    name: str
    scheme: str
    template: str
    revision: str = ""

    def locate(self, path: str, revision: str = "") -> AdapterLocation:
        """Where the adapter with this path in the source is; a plain name is one.

        Raises BadRequest for a path that could lead out of the source, or another revision than the source's.
        """
        segments = path.split("/")
        if len(segments) > _DEEPEST or not all(map(_SEGMENT.fullmatch, segments)):
            raise BadRequest(
                "a path in a source consists of names of letters, digits, '.', '_', '=', '+' or '-', joined by /",
                param="source",
            )
        if len(segments) > 1 and not self.template.endswith(PLACE):
            raise BadRequest(f"source {self.name} has no folders", param="source")
        if revision and (self.scheme != "hf" or revision != (self.revision or revision)):
            raise BadRequest(f"source {self.name} has no revision {revision[:100]}", param="source")
        return AdapterLocation(
            self.name,
            self.scheme,
            self.template.replace(PLACE, path),
            path,
            # The prefix of the name's own segment is no folder; that it is there follows from the template.
            (self.template.partition(PLACE)[0].rpartition("/")[0] or "/") if self.scheme == "file" else "",
            revision or self.revision,
        )

    def find_path(self, url: str) -> str | None:
        """The path in this source that a URL, without its revision, names; None if it is elsewhere."""
        before, _, after = f"{self.scheme}://{self.template}".partition(PLACE)
        if url.startswith(before) and url.endswith(after) and len(url) > len(before) + len(after):
            return url[len(before) : len(url) - len(after)]
        return None


def parse_source(given: str) -> NamedSource:
    """The source that an operator wrote as NAME=URL. Raises ValueError that says what is wrong."""
    name, equals, url = given.partition("=")
    if not equals or not _SOURCE_NAME.fullmatch(name):
        raise ValueError(f"{given} is not NAME=URL, such as support=s3://bucket/adapters")
    scheme, colon, rest = url.partition("://")
    if not colon or scheme not in SCHEMES:
        raise ValueError(f"source {name} is not a URL of {', '.join(SCHEMES)}")
    rest = rest.rstrip("/")
    if rest.count(PLACE) > 1 or re.search(r"[{}]", rest.replace(PLACE, "")):
        raise ValueError(f"source {name}: only one {PLACE} may be in braces")
    if re.search(r"[?#\\\s]|//", rest) or any(part in (".", "..") for part in rest.split("/")):
        raise ValueError(f"source {name} must be a plain path, without query, fragment, spaces, '.' and '..'")
    if scheme == "hf":
        return _parse_hub(name, rest)
    if scheme == "file":
        if not rest.startswith("/"):
            raise ValueError(f"source {name} must be an absolute path, such as file:///srv/adapters")
    else:
        host = rest.partition("/")[0]
        if not host or PLACE in host:
            raise ValueError(f"source {name} names no {'host' if scheme in ('http', 'https') else 'bucket'}")
        if "@" in host:
            raise ValueError(f"source {name} has a user or password in it; these belong in the environment")
        if scheme in ("http", "https"):
            _check_port(name, f"{scheme}://{host}")
    return NamedSource(name, scheme, rest if PLACE in rest else f"{rest}/{PLACE}")


def parse_sources(given: Sequence[str]) -> list[NamedSource]:
    """The sources that an operator wrote, in their order. Raises ValueError that says what is wrong."""
    sources = [parse_source(each) for each in given]
    names = [_variable(source.name) for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sources are called {name.lower()}")
    return sources


def find_location(sources: Sequence[NamedSource], given: str, name: str) -> AdapterLocation:
    """Where an admin's `source` is: NAME of a source, NAME/PATH in it, or a URL in it.

    Args:
        name: of the adapter, which is looked for if the source alone is named.

    Raises BadRequest if it is in no source.
    """
    if "://" in given:
        url, revision = given.rstrip("/"), ""
        if given.startswith("hf://"):
            url, revision = _without_revision(url)
        for source in sources:
            if (path := source.find_path(url)) is not None:
                return source.locate(path, revision)
    else:
        chosen, slash, path = given.partition("/")
        for source in sources:
            if source.name == chosen:
                return source.locate(path if slash else name)
    known = f"there are {shorten(source.name for source in sources)}" if sources else "the server has none"
    raise BadRequest(f"{given[:200]} is in no source of this server; {known} (--adapter-source)", param="source")


def options_variable(source: str) -> str:
    """The environment variable with the options, credentials among them, of a source."""
    return f"LORA_SERVE_SOURCE_OPTIONS_{_variable(source)}"


def _variable(name: str) -> str:
    return name.upper().replace("-", "_")


def _parse_hub(name: str, rest: str) -> NamedSource:
    path, revision = _without_revision(rest)
    if revision and not _REVISION.fullmatch(revision):
        raise ValueError(f"source {name}: {revision} is not a branch, tag or commit")
    parts = path.split("/")
    if not parts[0] or PLACE in parts[0]:
        raise ValueError(f"source {name} names no organisation of the hub")
    if PLACE not in path:
        path = f"{path}/{PLACE}"
    return NamedSource(name, "hf", path, revision)


def _without_revision(url: str) -> tuple[str, str]:
    """A hub URL, and the revision that follows its repository after @."""
    found = re.fullmatch(r"(.*?)@([^/@]+)(/.*)?", url)
    return (url, "") if found is None else (found[1] + (found[3] or ""), found[2])


def _check_port(name: str, url: str) -> None:
    try:
        if not urlsplit(url).hostname or urlsplit(url).port == 0:
            raise ValueError
    except ValueError:
        raise ValueError(f"source {name} names no host") from None


def is_adapter_name(name: str) -> bool:
    """Whether an adapter may be looked for under a name that was sent."""
    return re.fullmatch(NAME_PATTERN, name) is not None
