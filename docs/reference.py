"""Pages of the site that are made from the code: the API's routes and fields, the options, the metrics.

python docs/reference.py  # writes them; tests/test_docs.py fails if they are older than the code
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from lora_serve.api.app import create_app  # noqa: E402
from lora_serve.api.fine_tuning.job_store import JobStore  # noqa: E402
from lora_serve.config import ServeConfig  # noqa: E402
from lora_serve.job_metrics import JobCollector, RunningJob  # noqa: E402
from lora_serve.messages import SharedStatus, Stats, Update  # noqa: E402
from lora_serve.metrics import TOTALS_BY_QUANTUM, TOTALS_BY_TIER, Metrics  # noqa: E402
from lora_serve.sources.totals import RunningFetch, SourceTotals  # noqa: E402

MADE = "<!-- Made by `python docs/reference.py`; changes here are lost. -->"
Schema = dict[str, Any]
LARGE = 2**31 - 1  # a bound that nobody meets
GROUPS = {
    "openai": "OpenAI's routes",
    "anthropic": "Anthropic's routes",
    "adapters": "Adapters",
    "files": "Files of training data",
    "fine-tuning": "Fine-tuning",
    "tokenizer": "Tokenizer",
    "tinker": "Tinker's routes",
    "server": "The server",
}
PERMISSIONS = {"administer": "an admin key", "read_metrics": "a key that may read metrics"}


def application() -> FastAPI:
    """The application around an engine that was never started."""
    engine = SimpleNamespace(stats=Stats(), restarts=0, info=None, observe=lambda _: None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DOCS.parent / "demo" / "model" / "tokenizer.json"))
    return create_app(engine, tokenizer, ServeConfig(model="base"), None)  # type: ignore[arg-type]


def api_page() -> str:
    """Every route with the fields of its body, from the OpenAPI schema."""
    app = application()
    schema = app.openapi()
    needed = {(method, route.path): _needed(route) for route in _routes(app) for method in route.methods or ()}
    lines = [
        MADE,
        "# API reference",
        "",
        "Every route and every field of its body, made from the server's own OpenAPI schema (`/openapi.json`; with a",
        "form to try each at `/docs`). What the fields mean together, and what is not supported, is in [API](api.md).",
        "An unknown field is a 400 that names it.",
    ]
    for tag in (*GROUPS, *sorted(_tags(schema) - GROUPS.keys())):
        lines += ["", f"## {GROUPS.get(tag, tag)}"]
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                if tag in operation.get("tags", []):
                    lines += _operation(schema, method.upper(), path, operation, needed.get((method.upper(), path), ""))
    lines += ["", "## Parts of bodies", *_parts(schema)]
    return "\n".join(lines) + "\n"


def _operation(schema: Schema, method: str, path: str, operation: Schema, needed: str) -> Iterator[str]:
    yield from ("", f"### `{method} {path}`", "", " ".join(operation.get("description", "").split()))
    key = needed or ("a key, if there are any" if operation.get("security") else "no key")
    statuses = ", ".join(sorted(operation["responses"]))
    yield from ("", f"Needs {key}. Answers: {statuses}.")
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        yield from ("", f"Body (`{media}`):")
        yield from _fields(schema, _resolve(schema, content["schema"]))


def _fields(schema: Schema, model: Schema) -> Iterator[str]:
    """The fields of a model: those that change something in a table, the others in one line."""
    required, properties = model.get("required", []), model.get("properties", {})
    types = {name: _type(schema, field) for name, field in properties.items()}
    neutral = [name for name in properties if types[name].startswith(("only ", "null")) and name not in required]
    if rows := sorted((name for name in properties if name not in neutral), key=lambda name: name not in required):
        yield from ("", "| field | takes | |", "|---|---|---|")
        for name in rows:
            described = " ".join(str(properties[name].get("description", "")).split())
            yield f"| `{name}` | {types[name]} | {described or ('required' if name in required else '')} |"
    if neutral:
        given = ", ".join(f"`{name}` ({types[name].removeprefix('only ')})" for name in neutral)
        yield from ("", f"Accepted only at the value at which they mean nothing: {given}.")


def _parts(schema: Schema) -> Iterator[str]:
    """The models that bodies consist of."""
    waiting = [
        content["schema"]
        for path in schema["paths"].values()
        for operation in path.values()
        for content in operation.get("requestBody", {}).get("content", {}).values()
    ]
    bodies = {each["$ref"].rpartition("/")[2] for each in waiting if "$ref" in each}
    found: set[str] = set()
    while waiting:
        for name in re.findall(r"#/components/schemas/(\w+)", str(waiting.pop())):
            if name not in found:
                found.add(name)
                waiting.append(schema["components"]["schemas"][name])
    for name in sorted(found - bodies):
        model = schema["components"]["schemas"][name]
        if model.get("properties"):
            yield from ("", f"### {name}", "", " ".join(model.get("description", "").split()))
            yield from _fields(schema, model)


def _type(schema: Schema, field: Schema) -> str:
    """A type in a few words."""
    if choices := field.get("anyOf") or field.get("oneOf"):
        kinds = [_type(schema, each) for each in choices if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in field:
        return f"only `{_json(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{_json(each)}`" for each in field["enum"])
    if reference := field.get("$ref"):
        name = reference.rpartition("/")[2]
        found = schema["components"]["schemas"][name]
        return _type(schema, found) if "enum" in found else f"[{name}](#{name.lower()})" if _has_part(found) else name
    if field.get("type") == "array":
        return f"list of {_type(schema, field['items'])}" if field.get("items") else "list"
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum", field.get("exclusiveMaximum"))
    if low is not None and low == high:
        return f"only `{low:g}`"
    bounds = [f"≥ {low:g}"] if low is not None and abs(low) < LARGE else []
    bounds += [f"≤ {high:g}"] if high is not None and abs(high) < LARGE else []
    return " ".join([str(field.get("type", "anything")), ", ".join(bounds)]).strip()


def _has_part(model: Schema) -> bool:
    return bool(model.get("properties"))


def options_page() -> str:
    """Every option of `lora-serve serve`."""
    lines = [
        MADE,
        "# Options",
        "",
        "Of `lora-serve serve MODEL`. Each can be given on the command line, in the environment",
        "(`LORA_SERVE_PORT=9000` for `--port`) and in a YAML file that `--config` names (`port: 9000`); the first of",
        "these that has it counts.",
        "Sizes are written as `512MiB` or `4GiB`, lists with commas.",
        "",
        "| option | default | |",
        "|---|---|---|",
    ]
    for name, field in ServeConfig.model_fields.items():
        if name == "model":
            continue
        text, _, own = (field.description or "").partition(" (default: ")
        default = own.removesuffix(")") if own else _default(field.default)
        lines.append(f"| `--{name.replace('_', '-')}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """Every metric of `/metrics`."""
    tiers: Any = {"host": 1, "device": 1}
    by_tier = dict.fromkeys((*TOTALS_BY_TIER, "bytes"), tiers)
    by_tier |= {field: {"forward": 1} for field in TOTALS_BY_QUANTUM}
    shared = SharedStatus(1, 0, 0.0, 0, True)
    stats = Stats(resident=["a"], resident_in_host=["a"], step_costs={"decode": 1.0}, shared=shared, **by_tier)
    totals = SourceTotals(Counter({("s", "fetched"): 1}), Counter({"s": 1}), {"s": 1.0}, [RunningFetch("s")])
    job = RunningJob("j", "a", 1, 2, 3, 1.0, 1.0)
    metrics = Metrics(
        lambda: stats, lambda: 0, totals, JobCollector(JobStore(lambda: None).count_by_status, lambda: [job])
    )
    metrics.observe(Update([], stats=stats))
    timer = metrics.begin("chat")
    timer.admitted("a")
    timer.token(2)
    timer.token(1)
    timer.end("stop", 1, 3)
    metrics.count_error(400, "bad_request")
    lines = [
        MADE,
        "# Metrics",
        "",
        "`GET /metrics` in Prometheus' text format, for keys with `metrics: true`. Those that begin with `vllm:` are",
        "what LoRA-aware routers read. Adapters beyond the first 200 that were used are counted as `other`, the base",
        "as `base`.",
        "",
        "| metric | kind | labels | |",
        "|---|---|---|---|",
    ]
    for family in text_string_to_metric_families(metrics.render().decode()):
        if family.name.endswith("_created"):
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le", "quantile"})
        shown = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "api-reference.md": api_page,
    "options.md": options_page,
    "metrics.md": metrics_page,
}


def _routes(app: FastAPI) -> Iterator[APIRoute]:
    routers = [app.router, *(route.original_router for route in app.routes if hasattr(route, "original_router"))]
    return (route for router in routers for route in router.routes if isinstance(route, APIRoute))


def _needed(route: APIRoute) -> str:
    """The permission that a route asks for."""
    calls, waiting = set(), [route.dependant]
    while waiting:
        dependant = waiting.pop()
        calls.add(getattr(dependant.call, "__name__", ""))
        waiting += dependant.dependencies
    return next((text for name, text in PERMISSIONS.items() if name in calls), "")


def _tags(schema: Schema) -> set[str]:
    return {
        tag for path in schema["paths"].values() for operation in path.values() for tag in operation.get("tags", [])
    }


def _resolve(schema: Schema, field: Schema) -> Schema:
    reference = field.get("$ref")
    return schema["components"]["schemas"][reference.rpartition("/")[2]] if reference else field


def _json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None or value == [] else str(value)


if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(re.sub(r"[ \t]+$", "", make(), flags=re.MULTILINE), encoding="utf-8")
