// A field for a number.

import { html, useState } from "./ui.js";

/** What is typed ("0.0", on the way to "0.05") stays as it is until the field is left.
 *
 * `onChange` gets the number, or null for an empty or unfinished one.
 */
export function NumberField({ value, onChange, ...attributes }) {
  const [typed, setTyped] = useState(null);
  const input = ({ target }) => {
    setTyped(target.value);
    onChange(target.value === "" ? null : Number(target.value));
  };
  return html`
    <input type="number" ...${attributes} value=${typed ?? String(value ?? "")} onInput=${input}
      onBlur=${() => setTyped(null)} />`;
}
