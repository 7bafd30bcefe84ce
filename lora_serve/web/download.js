// A link to a file. With a key, which a link cannot send, the page fetches it and then saves it.

import { blob, hasKey } from "./api.js";
import { html, useState } from "./ui.js";

const LATER = 60_000; // ms for which a browser may still read what it saves

/** `file`: the name under which it is saved. `label` says more than `text`, to those who do not see what is around. */
export function Download({ path, file, text, label, onProblem }) {
  const [busy, setBusy] = useState(false);
  const save = async () => {
    setBusy(true);
    try {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await blob(path));
      link.download = file;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), LATER);
    } catch (error) {
      onProblem(error.message);
    }
    setBusy(false);
  };
  const click = (event) => {
    if (!hasKey()) return;
    event.preventDefault();
    if (!busy) save();
  };
  return html`
    <a href=${path} download aria-label=${label} onClick=${click}>${busy ? "Downloading…" : text}</a>`;
}
