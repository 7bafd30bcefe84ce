// Dialogs: the key, a confirmation, and a command to copy.

import { hasKey, isRemembered, setKey } from "./api.js";
import { html, newId, useEffect, useMemo, useRef, useState } from "./ui.js";

/** A modal dialog; Escape and its close button call `onClose`. */
export function Dialog({ title, onClose, children }) {
  const element = useRef();
  const id = useMemo(() => newId("dialog"), []);
  useEffect(() => element.current.showModal(), []);
  return html`
    <dialog ref=${element} aria-labelledby=${id} onClose=${onClose}>
      <header>
        <h2 id=${id}>${title}</h2>
        <button type="button" class="quiet" aria-label="Close" onClick=${onClose}>✕</button>
      </header>
      ${children}
    </dialog>`;
}

/** Ask for an API key. `problem`: what the server said of the last one. */
export function KeyForm({ problem, onDone }) {
  const [value, setValue] = useState("");
  const [remember, setRemember] = useState(isRemembered());
  const enter = (key) => {
    setKey(key, remember);
    setValue("");
    onDone();
  };
  return html`
    <form class="stack" onSubmit=${(event) => (event.preventDefault(), enter(value))}>
      <label class="field">API key
        <input type="password" autocomplete="off" required spellcheck=${false} value=${value} autofocus
          aria-invalid=${Boolean(problem)} aria-describedby=${problem ? "key-problem" : undefined}
          onInput=${(event) => setValue(event.target.value)} />
      </label>
      ${problem && html`<p class="error" id="key-problem" role="alert">${problem}</p>`}
      <label class="check">
        <input type="checkbox" checked=${remember} onChange=${(event) => setRemember(event.target.checked)} />
        Remember it in this browser
      </label>
      <p class="hint">Otherwise it is kept until this tab is closed. It is sent to this server only.</p>
      <div class="actions">
        ${hasKey() && html`<button type="button" onClick=${() => enter("")}>Forget the key</button>`}
        <button class="primary">Use this key</button>
      </div>
    </form>`;
}

/** Ask before something that cannot be undone. */
export function Confirm({ title, text, action, onConfirm, onClose }) {
  return html`
    <${Dialog} title=${title} onClose=${onClose}>
      <p>${text}</p>
      <div class="actions">
        <button type="button" autofocus onClick=${onClose}>Cancel</button>
        <button type="button" class="danger" onClick=${() => (onClose(), onConfirm())}>${action}</button>
      </div>
    <//>`;
}

/** Show a text, and copy it. */
export function CopyDialog({ title, text, onClose }) {
  const [copied, setCopied] = useState(false);
  const shown = useRef();
  const copy = async () => {
    getSelection().selectAllChildren(shown.current);
    // Without TLS browsers have no clipboard interface, only this command.
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else document.execCommand("copy");
    setCopied(true);
  };
  return html`
    <${Dialog} title=${title} onClose=${onClose}>
      <pre class="code" ref=${shown} tabindex="0">${text}</pre>
      <div class="actions"><button type="button" class="primary" autofocus onClick=${copy}>Copy</button></div>
      <p class="hint" role="status">${copied ? "Copied." : ""}</p>
    <//>`;
}
