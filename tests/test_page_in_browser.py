"""The page in a real browser, on real servers: what people see and do, with a mouse, a keyboard, a screen reader."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright
from server_process import ADAPTERS, ServerProcess

from demo.tasks import heldout_prompts
from lora_serve.api.key_file import hash_key

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
PROMPT = "three happy wolves sing tonight"
PHONE = {"width": 360, "height": 740}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ["--adapters", str(ADAPTERS), "--training-memory", "64MiB"]
    with ServerProcess(tmp_path_factory.mktemp("store"), *options) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A tab, and what went wrong in it: errors, refusals of the content policy, requests to other hosts."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.url = url
        self._context = browser.new_context(**context)
        self._context.set_default_timeout(10_000)
        self.page = self._context.new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        self.page.on("request", lambda request: self._check(request.url))

    def _check(self, url: str) -> None:
        if not url.startswith((self.url, "blob:")):
            self.problems.append(f"a request to {url}")

    def open(self, path: str = "/") -> Page:
        self.page.goto(self.url + path)
        return self.page

    def close(self) -> None:
        self._context.close()


@pytest.fixture
def visitor(browser: Browser, server: ServerProcess) -> Iterator[Visitor]:
    visitor = Visitor(browser, server.url)
    yield visitor
    visitor.close()
    assert visitor.problems == []


def check_accessible(page: Page) -> None:
    """Assert that axe finds nothing that it calls a violation."""
    found = Axe().run(page).response["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []


def check_fits(page: Page) -> None:
    """Assert that nothing is wider than the window."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("innerWidth")


def ask_both(page: Page) -> None:
    """Ask the base and an adapter the same, and wait for both answers."""
    page.get_by_label("Adapter of column B").select_option("shout")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Message").fill(PROMPT)
    page.get_by_label("Message").press("Enter")
    expect(page.get_by_label("Answers of shout").get_by_role("listbox")).to_contain_text(PROMPT.upper())
    expect(page.get_by_label("Answers of model").get_by_role("listbox")).to_contain_text(PROMPT)


# --- playground ------------------------------------------------------------------------------------------------------


def test_one_prompt_is_answered_by_the_base_and_an_adapter_side_by_side(visitor: Visitor) -> None:
    page = visitor.open()
    ask_both(page)
    column = page.get_by_label("Column B", exact=True)
    expect(column).to_contain_text("6 tokens")  # and their rate, unless all came at once
    expect(column).to_contain_text("first token")
    expect(column.locator(".served")).to_contain_text("shout@")
    spoken = column.locator("[aria-live=polite]")
    expect(spoken).to_have_text(f"shout: {PROMPT.upper()}")  # once it has ended; not token by token
    page.get_by_label("Message").fill("two red foxes run")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_label("Answers of shout")).to_contain_text("TWO RED FOXES RUN")
    expect(page.get_by_label("Answers of shout")).to_contain_text(PROMPT.upper())  # a conversation goes on


def test_a_token_shows_its_alternatives_on_hover_and_on_focus(visitor: Visitor) -> None:
    page = visitor.open()
    ask_both(page)
    tokens = page.get_by_label("Answers of shout").get_by_role("option")
    tip = page.get_by_role("tooltip")
    tokens.nth(0).hover()
    expect(tip).to_contain_text("THREE")
    expect(tip.locator("li")).to_have_count(5)
    page.mouse.move(0, 0)
    expect(tip).to_have_count(0)
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(tip).to_contain_text("␣HAPPY")
    page.keyboard.press("Escape")
    expect(tip).to_have_count(0)
    expect(tokens.last).to_have_class("token outside")  # the end token is no text of the answer
    expect(tokens.last).to_have_text("<end>")


def test_completions_are_streamed_behind_their_prompt(visitor: Visitor) -> None:
    page = visitor.open()
    page.get_by_role("button", name="Completion").click()
    page.get_by_role("button", name="Side by side").click()
    page.get_by_label("Adapter", exact=True).select_option("reverse")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Token probabilities").uncheck()
    page.get_by_label("Prompt", exact=True).fill(PROMPT + "\n")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.get_by_label("Answers of reverse")).to_contain_text("tonight sing wolves happy three")
    expect(page.get_by_role("listbox")).to_have_count(0)


# Answers of the server that a test sends piece by piece: `push` sends bytes.
SLOW_SERVER = """
const real = window.fetch;
window.fetch = (url, options) => String(url).endsWith("/v1/chat/completions")
  ? Promise.resolve(new Response(new ReadableStream({ start(controller) {
      window.push = (bytes) => controller.enqueue(new Uint8Array(bytes));
      options.signal.addEventListener("abort", () => controller.error(options.signal.reason));
    } })))
  : real(url, options);
"""


def test_text_is_shown_as_it_streams_and_can_be_stopped(visitor: Visitor) -> None:
    visitor.page.add_init_script(SLOW_SERVER)
    page = visitor.open()
    page.get_by_role("button", name="Side by side").click()
    page.get_by_label("Message").fill(PROMPT)
    page.get_by_label("Message").press("Enter")
    answer = page.get_by_label("Answers of model").locator(".answer .plain")
    expect(page.get_by_label("Answer", exact=True)).to_contain_text("Waiting")
    event = 'data: {"model": "m", "choices": [{"delta": {"content": "grüße "}, "finish_reason": null}]}\n\n'.encode()
    middle = event.index("ü".encode()) + 1  # network packets end anywhere
    page.evaluate("push", [*event[:middle]])
    page.evaluate("push", [*event[middle:-1]])
    expect(answer).to_have_text("")
    page.evaluate("push", [*event[-1:], *event])
    expect(answer).to_have_text("grüße grüße")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.evaluate("push", [*b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}\n\n'])
    expect(page.get_by_label("Answer", exact=True)).to_contain_text("tokens/s")
    page.get_by_label("Message").press("Escape")
    expect(page.get_by_label("Answer", exact=True)).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(answer).to_have_text("grüße grüße")


def test_adapters_are_composed_with_weights_and_the_request_can_be_copied(
    visitor: Visitor, server: ServerProcess
) -> None:
    page = visitor.open()
    page.get_by_label("Adapter of column B", exact=True).select_option("shout")
    column = page.get_by_label("Column B", exact=True)
    column.get_by_role("button", name="Add an adapter").click()
    column.get_by_label("Adapter of column B, adapter 2").select_option("reverse")
    column.get_by_role("slider", name="Weight of reverse").fill("0.25")
    column.get_by_label("Weight of shout, as a number").fill("0.5")
    page.get_by_label("Min p").press_sequentially("0.05")
    page.get_by_label("Message").fill("it's")
    page.get_by_role("button", name="Copy as curl").click()
    text = page.get_by_role("dialog").locator("pre").inner_text()
    assert text.count("curl -N " + server.url + "/v1/chat/completions") == 2
    assert '"name": "shout",\n      "weight": 0.5' in text
    assert '"name": "reverse",\n      "weight": 0.25' in text
    assert r"it'\''s" in text
    assert text.count('"min_p": 0.05') == 2
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Send").click()
    expect(column.locator(".served")).to_contain_text("shout@")
    expect(column.locator(".served")).to_contain_text("reverse@")


def test_an_error_is_shown_in_the_server_s_words(visitor: Visitor) -> None:
    page = visitor.open()
    page.get_by_label("Message").fill("wolves " * 1000)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_label("Column A", exact=True).get_by_role("alert")).to_contain_text(
        "maximum context length is 512 tokens"
    )
    visitor.problems.clear()  # browsers log every 400


# --- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_inspected_published_pinned_evicted_and_deleted(visitor: Visitor, server: ServerProcess) -> None:
    page = visitor.open("/#adapters")
    files = [path for path in (ADAPTERS / "initials").iterdir() if path.is_file()]
    page.locator("#upload-files").set_input_files(files)
    report = page.get_by_label("Upload an adapter")
    expect(report).to_contain_text("LoRA")
    expect(report).to_contain_text("of 43")
    assert len(server.http.get("/v1/adapters").json()["data"]) == 6  # only inspected yet
    report.get_by_label("Name").fill("mine")
    report.get_by_role("button", name="Publish").click()
    expect(page.get_by_text("mine is published.")).to_be_visible()
    own = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="mine", exact=True))
    expect(own.get_by_role("img", name="on disk", exact=True).first).to_be_visible()
    own.get_by_role("button", name="Pin mine").click()
    expect(own).to_contain_text("pinned")
    expect(own.get_by_role("img", name="on disk, host memory").first).to_be_visible()  # and on the device
    expect(own.get_by_role("button", name="Evict mine")).to_be_disabled()
    own.get_by_role("button", name="Unpin mine").click()
    own.get_by_role("button", name="Evict mine").click()
    expect(own.get_by_role("img", name="on disk", exact=True).first).to_be_visible()
    own.get_by_role("button", name="Delete mine").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(own).to_be_visible()
    own.get_by_role("button", name="Delete mine").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(own).to_have_count(0)
    assert len(server.http.get("/v1/adapters").json()["data"]) == 6


def test_settings_are_shown_and_nobody_s_version_is_written_over(
    visitor: Visitor, server: ServerProcess, tmp_path: Path
) -> None:
    page = visitor.open("/#adapters")
    files = [path for path in (ADAPTERS / "initials").iterdir() if path.is_file()]
    (tmp_path / "serve.yaml").write_text("system: Be brief.\n")
    page.locator("#upload-files").set_input_files([*files, tmp_path / "serve.yaml"])
    upload = page.get_by_label("Upload an adapter")
    expect(upload.get_by_label("Warnings")).to_contain_text("its serve.yaml is ignored")
    upload.get_by_label("Let its serve.yaml count").check()
    expect(upload.get_by_label("Settings")).to_contain_text("systemBe brief.")
    upload.get_by_label("Name").fill("theirs")
    sent: list[Any] = [("files", (path.name, path.read_bytes())) for path in files]
    theirs = server.http.put("/v1/adapters/theirs", files=sent).raise_for_status().json()  # somebody else, meanwhile
    upload.get_by_role("button", name="Publish").click()
    expect(upload.get_by_role("alert")).to_contain_text("theirs was published or changed by somebody else meanwhile")
    assert server.http.get("/v1/adapters/theirs").json()["versions"] == theirs["versions"]
    upload.get_by_role("button", name="Publish a new version").click()
    expect(page.get_by_text("theirs is published.")).to_be_visible()
    found = server.http.delete("/v1/adapters/theirs", headers={"If-Match": f'"{theirs["versions"][0]["digest"]}"'})
    assert found.status_code == 412
    (version, _) = server.http.get("/v1/adapters/theirs").json()["versions"]
    assert version["settings"] == {"system": "Be brief."}
    server.http.delete("/v1/adapters/theirs").raise_for_status()
    visitor.problems.clear()  # browsers log every 409


def test_dropped_and_picked_files_that_are_no_adapter_are_explained(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.open("/#adapters")
    (tmp_path / "notes.txt").write_text("no adapter")
    page.locator("#upload-files").set_input_files(tmp_path / "notes.txt")
    upload = page.get_by_label("Upload an adapter")
    expect(upload.get_by_role("alert")).to_contain_text("There is no adapter_config.json")
    upload.evaluate(
        """(element) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File(['{"peft_type": "LORA"}'], "adapter_config.json"));
          element.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }"""
    )
    expect(upload.get_by_role("alert")).to_contain_text("adapter_model.safetensors is missing")
    visitor.problems.clear()  # browsers log every 422


def test_a_dropped_trainer_folder_is_reduced_to_the_outermost_adapter(visitor: Visitor) -> None:
    page = visitor.open("/#adapters")
    module = page.locator("script[type=module]").get_attribute("src")
    assert module is not None
    chosen = page.evaluate(
        """async (module) => {
          const { chooseAdapter } = await import(new URL(module.replace("app.js", "adapter_files.js"), location.href));
          const file = new File(["x"], "x");
          const names = ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "1_Pooling/config.json"];
          const paths = [...names, ...names.map((name) => `checkpoint-5/${name}`)].map((path) => `my run/${path}`);
          const { parts, name } = chooseAdapter(paths.map((path) => ({ path, file })));
          return { name, paths: parts.map((part) => part[2]) };
        }""",
        module,
    )
    assert chosen == {
        "name": "my-run",
        "paths": ["adapter_config.json", "adapter_model.safetensors", "1_Pooling/config.json"],
    }


# --- aliases and versions --------------------------------------------------------------------------------------------


@pytest.fixture
def aliased(server: ServerProcess) -> Iterator[tuple[str, str]]:
    """The older and the newer version of an adapter, and the alias `live` for the newer one; all of it for one test."""
    digests = []
    for source in ("shout", "reverse"):
        files = [("files", (path.name, path.read_bytes())) for path in (ADAPTERS / source).iterdir() if path.is_file()]
        answer = server.http.put("/v1/adapters/voice", files=files)
        digests.append(answer.raise_for_status().json()["versions"][0]["digest"])
    put_alias(server, "live", {"adapter": f"voice@{digests[1]}", "weight": 95}, {"adapter": "initials", "weight": 5})
    yield digests[0], digests[1]
    for path in ("aliases/live", "aliases/next", "adapters/voice"):
        server.http.delete(f"/v1/{path}")


def put_alias(server: ServerProcess, name: str, *targets: dict[str, Any]) -> None:
    server.http.put(f"/v1/aliases/{name}", json={"targets": targets}).raise_for_status()


def targets_of(server: ServerProcess, name: str) -> dict[str, float]:
    found = server.http.get(f"/v1/aliases/{name}").raise_for_status().json()["targets"]
    return {target["adapter"]: target["weight"] for target in found}


def test_an_alias_is_made_changed_and_deleted(
    visitor: Visitor, server: ServerProcess, aliased: tuple[str, str]
) -> None:
    page = visitor.open("/#adapters")
    page.get_by_role("button", name="New alias", exact=True).click()
    dialog = page.get_by_role("dialog")
    check_accessible(page)
    page.keyboard.type("next")  # the name has the focus
    dialog.get_by_label("Target 1", exact=True).select_option("shout")
    dialog.get_by_role("button", name="Add a target").click()
    dialog.get_by_label("Target 2", exact=True).select_option(f"voice@{aliased[0]}")
    dialog.get_by_label("Weight of target 2").fill("3")
    expect(dialog).to_contain_text("75\u00a0%")
    dialog.get_by_label("A client stays on its target").select_option("user")
    dialog.get_by_label("Weight of target 2").press("Enter")
    said = page.get_by_text(f"next stands for shout (25\u00a0%), voice@{aliased[0][:12]} (75\u00a0%) now.")
    expect(said).to_be_visible()
    assert targets_of(server, "next") == {"shout": 1, f"voice@{aliased[0]}": 3}
    own = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="next", exact=True))
    expect(own).to_contain_text("sticky by user")
    own.get_by_role("button", name="Change next").click()
    dialog.get_by_role("button", name="Remove target 1").click()
    dialog.get_by_role("button", name="Save").click()
    expect(own.get_by_label("Targets of next")).not_to_contain_text("shout")
    assert targets_of(server, "next") == {f"voice@{aliased[0]}": 3}
    own.get_by_role("button", name="Delete next").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(page.get_by_text("The alias next is deleted.")).to_be_visible()
    assert server.http.get("/v1/aliases/next").status_code == 404


def test_an_alias_is_rolled_back_to_an_older_version_which_can_be_downloaded(
    visitor: Visitor, server: ServerProcess, aliased: tuple[str, str]
) -> None:
    older, newer = aliased
    page = visitor.open("/#adapters")
    own = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name="voice", exact=True))
    own.get_by_text("Versions and report").click()
    expect(own.get_by_label(f"Version {newer[:12]}")).to_contain_text("live stands for it")
    version = own.get_by_label(f"Version {older[:12]}")
    with page.expect_download() as download:
        version.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == f"voice-{older[:12]}.tar"
    with tarfile.open(download.value.path()) as tar:
        assert tar.getnames() == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    version.get_by_role("button", name=f"Roll back live to voice@{older[:12]}").click()
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    expect(version).to_contain_text("live stands for it")
    assert targets_of(server, "live") == {f"voice@{older}": 95, "initials": 5}
    page.get_by_role("button", name="Try live").click()
    expect(page.get_by_label("Adapter of column B", exact=True)).to_have_value("live")


def test_a_change_by_somebody_else_is_told_and_not_written_over(
    visitor: Visitor, server: ServerProcess, aliased: tuple[str, str]
) -> None:
    page = visitor.open("/#adapters")
    dialog = page.get_by_role("dialog")
    page.get_by_role("button", name="Change live").click()
    put_alias(server, "live", {"adapter": "shout"})  # somebody else, meanwhile
    dialog.get_by_label("Weight of target 2").fill("50")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.get_by_role("alert")).to_have_text(
        "Somebody else changed live meanwhile: it stands for shout now. Save again to replace that by yours."
    )
    assert targets_of(server, "live") == {"shout": 1}
    dialog.get_by_role("button", name="Take theirs").click()
    expect(dialog.get_by_label("Target 1", exact=True)).to_have_value("shout")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_have_count(0)
    page.get_by_role("button", name="New alias", exact=True).click()
    dialog.get_by_label("Name").fill("live")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.get_by_role("alert")).to_contain_text("live exists already: it stands for shout.")
    visitor.problems.clear()  # browsers log every 412


# --- training --------------------------------------------------------------------------------------------------------


def write_examples(path: Path, count: int) -> Path:
    """Chats in which a sentence is answered in capitals."""
    chats = [[("user", text), ("assistant", text.upper())] for text in heldout_prompts(count)]
    lines = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_an_adapter_is_trained_tried_beside_the_base_and_given_an_alias(
    visitor: Visitor, server: ServerProcess, tmp_path: Path
) -> None:
    page = visitor.open("/#training")
    examples, validation = page.get_by_label("Examples", exact=True), page.get_by_label("Validation examples")
    upload = page.locator("input[type=file]")
    bad = tmp_path / "<img src=x onerror=alert(1)>.jsonl"
    bad.write_text(write_examples(tmp_path / "good.jsonl", 24).read_text() + '\n{"messages": 5}\nnonsense')
    upload.first.set_input_files(bad)
    mistakes = page.get_by_role("alert")
    expect(mistakes).to_contain_text("<img src=x onerror=alert(1)>.jsonl: no valid training data in 2 of the 26 lines")
    expect(mistakes.get_by_role("listitem")).to_have_text(
        ["line 25: messages: Input should be a valid list", re.compile("line 26: the line is not valid JSON")]
    )
    visitor.problems.clear()  # browsers log every 400
    upload.first.set_input_files(tmp_path / "good.jsonl")
    expect(examples.locator("option:checked")).to_contain_text("good.jsonl")
    upload.last.set_input_files(write_examples(tmp_path / "held-out.jsonl", 10))
    expect(validation.locator("option:checked")).to_contain_text("held-out.jsonl")

    page.get_by_label("Name", exact=True).fill("<b>long</b>")
    for label, value in {"Epochs": "1000", "Batch size": "12", "Learning rate": "0.001", "Rank": "4"}.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_role("button", name="Start training").click()
    heading = page.locator("#job-title")
    expect(heading).to_be_focused()
    expect(heading).to_have_text(re.compile("^b-long-b-[0-9a-f]{10}$"))
    curve = page.get_by_role("figure").first
    expect(curve.locator("canvas")).to_be_visible()
    expect(curve.get_by_role("listitem")).to_have_text([re.compile(r"training\s+[\d.]+"), re.compile(r"validation\s")])
    progress = page.get_by_role("progressbar")
    expect(page.get_by_text(re.compile(r"step [\d,.]+ of 2,000 · epoch \d+ of 1000 · [\d,]+ tokens"))).to_be_visible()
    step = int(progress.get_attribute("aria-valuenow") or 0)
    expect(progress).not_to_have_attribute("aria-valuenow", str(step))
    page.get_by_label("What is tried").select_option("as it is now")
    page.get_by_label("Message to both").fill(PROMPT)
    page.get_by_label("Message to both").press("Enter")
    expect(page.get_by_label("Answers of model").get_by_text(PROMPT)).to_have_count(
        2
    )  # asked, and answered by the base
    expect(page.get_by_role("heading", name=re.compile("Trained: step [1-9]"))).to_be_visible()
    expect(page.locator(".served", has_text=re.compile(r"b-long-b-.*-step-\d+@"))).to_be_visible()
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".bar-row").get_by_role("status")).to_have_text("paused")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".bar-row").get_by_role("status")).to_have_text("running")
    page.get_by_role("button", name="Cancel job").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
    expect(page.locator(".bar-row").get_by_role("status")).to_have_text("cancelled")

    page.get_by_label("Name", exact=True).fill("short")
    page.get_by_label("Epochs", exact=True).fill("2")
    page.get_by_role("button", name="Start training").click()
    expect(page.locator(".bar-row").get_by_role("status")).to_have_text("succeeded")
    name = heading.inner_text()
    assert name.startswith("short-")
    page.get_by_label("Message to both").fill(PROMPT)
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_label("Answers of the result")).to_contain_text("three", ignore_case=True)
    expect(page.locator(".served", has_text=f"{name}@")).to_be_visible()
    page.get_by_text("Settings and events").click()
    expect(page.get_by_label("Events")).to_contain_text("The job has successfully completed")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        check_accessible(page)
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    check_fits(page)

    page.get_by_role("button", name="Let it stand for this").click()
    page.get_by_role("dialog").get_by_label("Name").fill("trained")
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    expect(page.get_by_text(re.compile(f"trained stands for {name}@[0-9a-f]+ now"))).to_be_visible()
    (target,) = targets_of(server, "trained")
    assert target.startswith(f"{name}@")
    for _ in range(2):
        shown = page.get_by_role("heading", name=heading.inner_text())
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(shown).to_have_count(0)
    expect(page.get_by_role("heading", name="0 jobs")).to_be_visible()
    assert server.http.get("/v1/fine_tuning/jobs").json()["data"] == []
    assert server.http.get(f"/v1/adapters/{name}").is_success  # what was published stays
    server.http.delete("/v1/aliases/trained")
    for adapter in server.http.get("/v1/adapters").json()["data"]:
        if adapter["name"].startswith(("short-", "b-long-b-")):
            server.http.delete(f"/v1/adapters/{adapter['name']}").raise_for_status()


# --- charts and reference --------------------------------------------------------------------------------------------


def test_charts_are_drawn_from_the_metrics(visitor: Visitor, server: ServerProcess) -> None:
    page = visitor.open("/#charts")
    expect(page.get_by_role("figure")).to_have_count(6)
    server.complete(PROMPT, "shout")
    tokens, first_token = page.get_by_role("figure").nth(0), page.get_by_role("figure").nth(1)
    expect(tokens.get_by_role("listitem").filter(has_text="shout")).to_be_visible()
    expect(first_token.get_by_role("listitem").first).to_contain_text("ms")
    expect(tokens.locator("canvas")).to_be_visible()


def test_the_reference_shows_every_route_and_tries_it(visitor: Visitor, server: ServerProcess) -> None:
    page = visitor.open("/docs")
    expect(page.locator(".operation").first).to_be_visible()
    paths = server.http.get("/openapi.json").json()["paths"]
    assert page.locator(".operation").count() == sum(map(len, paths.values()))
    page.get_by_label("Filter routes").fill("/v1/completions")
    page.locator(".operation summary").click()
    page.get_by_label("Body", exact=True).fill('{"prompt": "two red foxes\\n", "adapter": "shout", "temperature": 0}')
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_label("Response")).to_contain_text("TWO RED FOXES")
    check_accessible(page)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("keyed")
    keys = folder / "keys.yaml"
    keys.write_text(
        f"boss: {{hash: '{hash_key('sk-boss')}', admin: true}}\n"
        f"guest: {{hash: '{hash_key('sk-guest')}', adapters: [shout]}}\n"
    )
    with ServerProcess(folder / "store", "--adapters", str(ADAPTERS), "--api-key-file", str(keys)) as server:
        yield server


def test_a_key_is_asked_for_and_what_it_may_not_do_is_left_out(browser: Browser, keyed: ServerProcess) -> None:
    visitor = Visitor(browser, keyed.url)
    page = visitor.open()
    expect(page.get_by_role("heading", name="This server needs an API key")).to_be_visible()
    check_accessible(page)
    page.get_by_label("API key", exact=True).fill("sk-wrong")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("alert")).to_have_text("unknown API key")
    page.get_by_label("API key", exact=True).fill("sk-guest")
    page.get_by_role("button", name="Use this key").click()
    ask_both(page)
    assert "sk-guest" not in page.content()
    page.get_by_role("link", name="Adapters").click()
    expect(page.get_by_text("Changing them needs an admin key")).to_be_visible()
    expect(page.get_by_role("heading", level=3)).to_have_text(["shout"])  # what the key may use
    page.get_by_text("Versions and report").click()
    expect(page.get_by_role("button", name=re.compile("Delete|alias"))).to_have_count(0)
    expect(page.get_by_role("link", name="Download")).to_have_count(0)
    page.get_by_role("link", name="Training").click()
    expect(page.get_by_text("Training needs an admin key")).to_be_visible()
    page.get_by_role("link", name="Charts").click()
    expect(page.get_by_text("metrics: true")).to_be_visible()
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
    page.goto(keyed.url + "/docs")  # the same tab keeps its key
    expect(page.get_by_role("heading", name="API reference")).to_be_visible()
    page.goto(keyed.url)
    page.get_by_role("button", name="guest").click()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_role("heading", name="This server needs an API key")).to_be_visible()
    page.get_by_label("Remember it").check()
    page.get_by_label("API key", exact=True).fill("sk-boss")
    page.get_by_role("button", name="Use this key").click()
    page.get_by_role("link", name="Adapters").click()
    page.get_by_text("Versions and report").last.click()
    with page.expect_download() as download:  # a link cannot send the key
        page.get_by_role("link", name="Download").click()
    assert tarfile.is_tarfile(download.value.path())
    page.get_by_role("link", name="Training").click()
    expect(page.get_by_text("start it with --training-memory")).to_be_visible()
    page.get_by_role("link", name="Charts").click()
    expect(page.get_by_role("figure")).to_have_count(6)
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [1, 0]
    visitor.close()
    assert [problem for problem in visitor.problems if not re.search("40[01]", problem)] == []  # and this for training


# --- everybody -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["playground", "adapters", "charts"])
def test_every_view_is_accessible_and_fits_a_phone(
    browser: Browser, server: ServerProcess, tmp_path: Path, view: str, scheme: Any
) -> None:
    visitor = Visitor(browser, server.url, color_scheme=scheme, reduced_motion="reduce")
    page = visitor.open(f"/#{view}")
    if view == "playground":
        ask_both(page)
    if view == "adapters":
        put_alias(server, "canary", {"adapter": "shout", "weight": 95}, {"adapter": "reverse", "weight": 5})
        expect(page.get_by_role("heading", name="canary")).to_be_visible()
        page.get_by_text("Versions and report").last.click()  # of upper or shout
    if view == "charts":
        expect(page.get_by_role("figure")).to_have_count(6)
    check_accessible(page)
    page.screenshot(path=tmp_path / f"{view}-{scheme}.png")
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    check_fits(page)
    page.screenshot(path=tmp_path / f"{view}-{scheme}-phone.png", full_page=True)
    visitor.close()
    assert visitor.problems == []
