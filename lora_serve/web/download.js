// A link to the files of a version. With a key, which a link cannot send, the page fetches them and then saves them.

import { blob, hasKey } from "./api.js";
import { short } from "./format.js";
import { html, useState } from "./ui.js";

const LATER = 60_000; // ms for which a browser may still read what it saves

export function Download({ name, digest, onProblem }) {
  const [busy, setBusy] = useState(false);
  const path = `v1/adapters/${name}/files?version=${digest}`;
  const save = async () => {
    setBusy(true);
    try {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await blob(path));
      link.download = `${name}-${short(digest)}.tar`;
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
    <a href=${path} download aria-label=${`Download ${name}@${short(digest)}`} onClick=${click}>
      ${busy ? "Downloading…" : "Download"}</a>`;
}
