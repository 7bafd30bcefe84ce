// Uploads: files are dropped or picked, inspected by the server, and published once its report has been seen.

import { chooseAdapter, dropped, formOf, picked } from "./adapter_files.js";
import { upload } from "./api.js";
import { bytes, percent } from "./format.js";
import { Report } from "./report.js";
import { classes, html, useRef, useState } from "./ui.js";

const IDLE = { step: "idle" };

/** `onPublished` is called after every attempt: there may be something new. */
export function Upload({ adapters, onPublished }) {
  const [state, setState] = useState(IDLE); // step: idle, sending, inspected, published; adapter, report, trust, seen (adapters), problem, part
  const [name, setName] = useState("");
  const [over, setOver] = useState(false);
  const files = useRef();
  const folder = useRef();
  const existing = (state.seen ?? adapters).find((adapter) => adapter.name === name);
  const exists = existing !== undefined;

  const send = async (what, method, path, adapter, form, headers) => {
    setState({ step: "sending", what, part: 0, adapter });
    return upload(method, path, form, (part) => setState({ step: "sending", what, part, adapter }), headers);
  };
  const inspect = async (found) => {
    try {
      const adapter = chooseAdapter(await found);
      setName(adapter.name);
      await report(adapter, false);
    } catch (error) {
      setState({ ...IDLE, problem: error.message });
    }
  };
  const report = async (adapter, trust) => {
    const found = await send("Inspecting", "POST", "v1/adapters/inspect", adapter, formOf(adapter, trust));
    const hasSettings = trust || found.report.warnings?.some((warning) => warning.includes("serve.yaml is ignored"));
    setState({ step: "inspected", adapter, report: found, trust, hasSettings, seen: adapters });
  };
  const trustSettings = async (event) => {
    const before = state;
    try {
      await report(before.adapter, event.target.checked);
    } catch (error) {
      setState({ ...before, problem: error.message });
    }
  };
  const publish = async (event) => {
    event.preventDefault();
    const before = state;
    const form = formOf(before.adapter, before.trust, name);
    const [newest] = existing?.versions ?? [];
    try {
      if (exists) { // only what was there when the report was made is replaced
        const seen = newest ? { "If-Match": `"${newest.digest}"` } : {};
        await send("Publishing", "PUT", `v1/adapters/${name}`, before.adapter, form, seen);
      } else {
        await send("Publishing", "POST", "v1/adapters", before.adapter, form);
      }
      setState({ step: "published", name });
    } catch (error) {
      const changed = error.status === 412 || (error.status === 409 && !exists);
      const problem = changed ? `${name} was published or changed by somebody else meanwhile. Nothing was published: ` +
        "look at what there is now, then publish again." : error.message;
      setState({ ...before, problem, seen: changed ? undefined : before.seen });
    }
    onPublished();
  };
  const pick = (event) => {
    inspect(picked(event.target.files));
    event.target.value = "";
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    inspect(dropped(event.dataTransfer.items));
  };
  const busy = state.step === "sending";

  return html`
    <section class=${classes("card upload", over && "over")} aria-labelledby="upload-title"
      onDragOver=${(event) => (event.preventDefault(), setOver(true))}
      onDragLeave=${() => setOver(false)} onDrop=${drop}>
      <h2 id="upload-title">Upload an adapter</h2>
      <p class="hint">Drop a PEFT folder, its files, or a .zip or .tar.gz here. Nothing is published before you
        have seen the report.</p>
      <input ref=${files} id="upload-files" type="file" multiple hidden onChange=${pick}
        aria-label="Files or an archive" />
      <input ref=${folder} id="upload-folder" type="file" webkitdirectory hidden onChange=${pick}
        aria-label="A folder" />
      <div class="actions start">
        <button type="button" disabled=${busy} onClick=${() => files.current.click()}>Choose files</button>
        <button type="button" disabled=${busy} onClick=${() => folder.current.click()}>Choose a folder</button>
      </div>
      <div role="status">
        ${busy && html`
          <p>${state.what} ${bytes(state.adapter.size)}${state.part < 1 ? `: ${percent(state.part)} sent` : "…"}</p>
          <div class="meter" aria-hidden="true"><span style=${{ width: `${100 * state.part}%` }}></span></div>`}
        ${state.step === "published" && html`<p class="good">${state.name} is published.</p>`}
      </div>
      ${state.problem && html`<p class="error" role="alert">${state.problem}</p>`}
      ${state.step === "inspected" && html`
        <form class="stack inspected" onSubmit=${publish}>
          <h3>Report</h3>
          <${Report} found=${state.report} />
          ${state.hasSettings && html`
            <label class="check">
              <input type="checkbox" checked=${state.trust} onChange=${trustSettings} />
              Let its serve.yaml count: its system prompt, chat template, tokens and defaults
            </label>`}
          <label class="field">Name
            <input value=${name} required maxlength="64" pattern="[A-Za-z0-9][A-Za-z0-9._\\-]*" spellcheck=${false}
              autocomplete="off" onInput=${(event) => setName(event.target.value)} />
          </label>
          ${exists && html`
            <p class="hint">This name exists: it gets a new version. Running requests finish on the old one.</p>`}
          <div class="actions">
            <button type="button" onClick=${() => setState(IDLE)}>Cancel</button>
            <button class="primary">${exists ? "Publish a new version" : "Publish"}</button>
          </div>
        </form>`}
    </section>`;
}
