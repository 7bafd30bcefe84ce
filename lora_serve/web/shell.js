// What the page and the reference have in common: the brand, and the question for a key.

import { KeyForm } from "./dialogs.js";
import { html } from "./ui.js";

export const Brand = () => html`
  <span class="brand">
    <img src=${new URL("icon.svg", import.meta.url)} alt="" width="24" height="24" /> lora-serve
  </span>`;

/** Shown instead of everything else, until the server takes the key. */
export const KeyCard = ({ problem, onDone }) => html`
  <section class="card narrow" aria-labelledby="key-title">
    <h1 id="key-title">This server needs an API key</h1>
    <${KeyForm} problem=${problem} onDone=${onDone} />
  </section>`;
