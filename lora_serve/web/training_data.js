// Files of examples: one is chosen among those that were uploaded, or uploaded, and its mistakes are shown by line.

import { call, upload } from "./api.js";
import { Confirm } from "./dialogs.js";
import { ago, bytes, percent } from "./format.js";
import { classes, html, newId, useMemo, useRef, useState } from "./ui.js";

/** What the server says of a file: a summary, and a mistake for each of the first wrong lines. */
function mistakesOf(message) {
  const [summary, ...mistakes] = message.split(/(?:: |; )(?=line \d+: )|; (?=and [\d,]+ more$)/);
  return { summary, mistakes };
}

/** `value`: the id of a file, or empty. `onFiles`: the list of files is to be read again. */
export function ExamplesField({ label, hint, files, value, required, onChange, onFiles }) {
  const [sending, setSending] = useState(null); // {name, part}
  const [problem, setProblem] = useState(null);
  const [over, setOver] = useState(false);
  const [deleting, setDeleting] = useState(false);
  const input = useRef();
  const ids = useMemo(() => ({ field: newId("examples"), problem: newId("mistakes") }), []);
  const chosen = files.find((file) => file.id === value);

  const send = async (file) => {
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file);
    setProblem(null);
    setSending({ name: file.name, part: 0 });
    try {
      const made = await upload("POST", "v1/files", form, (part) => setSending({ name: file.name, part }));
      await onFiles();
      onChange(made.id);
    } catch (error) {
      setProblem({ name: file.name, ...mistakesOf(error.message) });
    }
    setSending(null);
  };
  const pick = ({ target }) => {
    if (target.files.length) send(target.files[0]);
    target.value = "";
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    if (event.dataTransfer.files.length && !sending) send(event.dataTransfer.files[0]);
  };
  const remove = async () => {
    try {
      await call("DELETE", `v1/files/${value}`);
      onChange("");
    } catch (error) {
      setProblem({ name: chosen.filename, summary: error.message, mistakes: [] });
    }
    onFiles();
  };
  return html`
    <div class=${classes("examples", over && "over")} onDrop=${drop} onDragLeave=${() => setOver(false)}
      onDragOver=${(event) => (event.preventDefault(), setOver(true))}>
      <div class="field">
        <label for=${ids.field}>${label}</label>
        <select id=${ids.field} value=${value} required=${required}
          aria-describedby=${problem ? ids.problem : undefined} onChange=${(event) => onChange(event.target.value)}>
          <option value="">${required ? "Choose or upload a file" : "None"}</option>
          ${files.map((file) => html`
            <option value=${file.id}>${file.filename} · ${bytes(file.bytes)} · ${ago(file.created_at)}</option>`)}
        </select>
      </div>
      <input ref=${input} type="file" accept=".jsonl,.json,.txt" hidden onChange=${pick}
        aria-label=${`A file: ${label}`} />
      <div class="actions start">
        <button type="button" disabled=${Boolean(sending)} aria-label=${`Upload a file: ${label}`}
          onClick=${() => input.current.click()}>Upload</button>
        ${chosen && html`
          <button type="button" class="danger quiet" aria-label=${`Delete ${chosen.filename}`}
            onClick=${() => setDeleting(true)}>Delete</button>`}
        <span class="hint" role="status">
          ${sending ? `${sending.name}: ${sending.part < 1 ? `${percent(sending.part)} sent` : "checking…"}` : hint}
        </span>
      </div>
      ${problem && html`
        <div class="error" role="alert" id=${ids.problem}>
          <p>${problem.name}: ${problem.summary}</p>
          <ul>${problem.mistakes.map((mistake) => html`<li>${mistake}</li>`)}</ul>
        </div>`}
    </div>
    ${deleting && html`
      <${Confirm} title=${`Delete ${chosen.filename}?`} action="Delete" onConfirm=${remove}
        onClose=${() => setDeleting(false)} text="Jobs that use it go on and keep what they need." />`}`;
}
