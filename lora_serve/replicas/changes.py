"""Which requests change something that every replica must change, and what came of them.

Publishing, deleting, pinning and what aliases stand for are kept in the journal, so that replicas make them up; loading
and evicting are done where a replica runs. Routes that read folders of the server's machine, or that keep files in the
server's store, are refused: replicas are on several machines, and each has a store of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec

from lora_serve.errors import BadRequest, PartlyApplied
from lora_serve.replicas.compaction import ADAPTERS, ALIASES
from lora_serve.replicas.forwarding import ForwardedRequest, ServerLost, WholeResponse

PUBLISH = "/v1/adapters"
NAMED = re.compile(r"/v1/(adapters|aliases)/[^/]+")  # what PUT makes and DELETE removes
OPERATION = re.compile(r"(/v1/adapters/[^/]+)/(load|evict|pin|unpin)")
OF_A_FOLDER = re.compile(r"(/v1)?/(un)?load_lora_adapter")
OF_ONE_SERVER = re.compile(r"/v1/(files|fine_tuning)(/.*)?", re.DOTALL)


class ChangeKind(NamedTuple):
    """How a change is made.

    Attributes:
        kept: in the journal.
        thing: what it is about; empty if only the response tells.
        upload: whether the body is an adapter.
    """

    kept: bool
    thing: str = ""
    upload: bool = False


def change_kind(method: str, path: str) -> ChangeKind | None:
    """What kind of change a request is; None if one replica can answer it. Raises `BadRequest` for a refused route.

    Only routes that change something at every replica are changes: those wait for each other, whoever sends them.
    """
    if method == "OPTIONS":
        return None
    if OF_A_FOLDER.fullmatch(path):
        raise BadRequest("several replicas are behind this endpoint: publish an adapter by PUT /v1/adapters/{name}")
    if OF_ONE_SERVER.fullmatch(path):
        raise BadRequest(
            "several replicas are behind this endpoint, and files are kept by one server: "
            "send /v1/files and /v1/fine_tuning to a single lora-serve server"
        )
    if method in ("PUT", "DELETE") and (named := NAMED.fullmatch(path)):
        return ChangeKind(kept=True, thing=path, upload=method == "PUT" and named[1] == "adapters")
    if method == "POST" and path == PUBLISH:
        return ChangeKind(kept=True, upload=True)
    if method == "POST" and (found := OPERATION.fullmatch(path)):
        pins = found[2] in ("pin", "unpin")
        return ChangeKind(kept=pins, thing=f"{found[1]}/pin" if pins else "")
    return None


def as_kept(
    kind: ChangeKind, request: ForwardedRequest, response: WholeResponse
) -> tuple[str, ForwardedRequest, tuple[str, ...]]:
    """The thing, the request and the names as the journal keeps them: a change that can be made twice."""
    if request.method == "DELETE" or (request.method == "POST" and kind.thing):  # or a pin
        return kind.thing, request, ()
    answer = msgspec.json.decode(response.body)
    if kind.thing.startswith(ALIASES):
        return kind.thing, request, tuple(target["adapter"] for target in answer["targets"])
    target = f"{ADAPTERS}{answer['name']}"
    version = f"{answer['name']}@{answer['versions'][0]['digest']}"
    return target, replace(request, method="PUT", target=target), (version,)


def merge(method: str, results: Sequence[WholeResponse | ServerLost | BaseException], kept: bool) -> WholeResponse:
    """The response to a change that was sent to all replicas: the first, if all succeeded or all refused it.

    Raises: `PartlyApplied`, which names the replicas that it did not reach; with `kept`, they make it up.
    """
    whole = [each for each in results if isinstance(each, WholeResponse)]
    done = [each for each in whole if each.begin.status < 400]
    if whole and not done and len(whole) == len(results):
        return whole[0]
    missed = [_problem(each) for each in results if not _applied(method, each)]
    if done and not missed:
        return done[0]
    later = "; those make it up as soon as they can" if kept and done else "; send it again"
    raise PartlyApplied(
        f"the change was made at {len(results) - len(missed)} of {len(results)} replicas, "
        f"not at {', '.join(missed)}{later}",
        retry_after=2,
    )


def _applied(method: str, result: WholeResponse | ServerLost | BaseException) -> bool:
    if not isinstance(result, WholeResponse):
        return False
    return result.begin.status < 400 or (method == "DELETE" and result.begin.status == 404)  # gone already


def _problem(result: WholeResponse | ServerLost | BaseException) -> str:
    if isinstance(result, WholeResponse):
        return f"{result.begin.replica} (status {result.begin.status})"
    return f"{result.replica} ({result.reason})" if isinstance(result, ServerLost) else "one that ended meanwhile"
