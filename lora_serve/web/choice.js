// The choice of a column: the base, or adapters with weights.

import { short } from "./format.js";
import { NumberField } from "./number_field.js";
import { html, newId, useMemo } from "./ui.js";

const MOST = 8; // adapters of one request
const MOST_WEIGHT = 100;
const ALONE = { report: { composable: false } }; // what an alias stands for changes, perhaps to what cannot be summed

/** Adapters by name, or by name@digest for an older version, and aliases, that can be asked for. */
function options(adapters, aliases) {
  const served = adapters.filter((adapter) => !adapter.broken);
  const older = served.flatMap((adapter) =>
    adapter.versions.slice(1).map((version) => ({ name: `${adapter.name}@${short(version.digest)}`, version })),
  );
  return {
    newest: served.map((adapter) => ({ name: adapter.name, version: adapter.versions[0] })),
    older,
    standing: aliases.filter((alias) => !alias.broken).map((alias) => ({ name: alias.name, version: ALONE })),
  };
}

/** Choose adapters. `choice`: a list of {name, weight}; empty is the base.
 *
 * `onChange` gets what makes a new one of it.
 */
export function AdapterChoice({ label, choice, adapters, aliases, onChange }) {
  const { newest, older, standing } = options(adapters, aliases);
  const all = [...newest, ...older, ...standing];
  const composable = (name) => all.find((each) => each.name === name)?.version.report.composable !== false;
  const set = (index, change) =>
    onChange((before) => before.map((each, at) => (at === index ? { ...each, ...change } : each)));
  const left = newest.filter(({ name }) => composable(name) && !choice.some((each) => each.name === name));
  const isSum = choice.length > 0 && choice.every(({ name }) => composable(name));
  const mayAdd = isSum && choice.length < MOST && left.length > 0;
  const add = () => onChange((before) => [...before, { name: left[0].name, weight: 1 }]);

  const option = ({ name }) => html`<option value=${name}>${name}</option>`;
  const select = (value, title, base, onSelect) => html`
    <select aria-label=${title} value=${value} onChange=${(event) => onSelect(event.target.value)}>
      ${base && html`<option value="">Base model</option>`}
      <optgroup label="Adapters">${newest.map(option)}</optgroup>
      ${standing.length > 0 && html`<optgroup label="Aliases">${standing.map(option)}</optgroup>`}
      ${older.length > 0 && html`<optgroup label="Older versions">${older.map(option)}</optgroup>`}
    </select>`;

  if (!choice.length) {
    return html`<div class="choice"><div class="chosen-adapter">
      ${select("", label, true, (name) => name && onChange(() => [{ name, weight: 1 }]))}
    </div></div>`;
  }
  return html`
    <div class="choice">
      ${choice.map(({ name, weight }, index) => html`
        <div class="chosen-adapter" key=${index}>
          ${select(name, index ? `${label}, adapter ${index + 1}` : label, choice.length === 1, (other) =>
            other ? set(index, { name: other, weight: composable(other) ? weight : 1 }) : onChange(() => []))}
          ${composable(name)
            ? html`<${Weight} name=${name} value=${weight} onChange=${(value) => set(index, { weight: value })} />`
            : html`<span class="hint">used alone, with weight 1</span>`}
          ${choice.length > 1 && html`
            <button type="button" class="quiet" aria-label=${`Remove ${name}`}
              onClick=${() => onChange((before) => before.filter((_, at) => at !== index))}>✕</button>`}
        </div>`)}
      ${mayAdd && html`<button type="button" class="quiet add" onClick=${add}>+ Add an adapter to the sum</button>`}
    </div>`;
}

function Weight({ name, value, onChange }) {
  const id = useMemo(() => newId("weight"), []);
  const change = (given) => given !== null && onChange(Math.max(-MOST_WEIGHT, Math.min(MOST_WEIGHT, given)));
  return html`
    <span class="weight">
      <label class="unseen" for=${id}>Weight of ${name}</label>
      <input id=${id} type="range" min="-1" max="2" step="0.05" value=${value}
        onInput=${(event) => change(Number(event.target.value))} />
      <${NumberField} min=${-MOST_WEIGHT} max=${MOST_WEIGHT} step="0.05" value=${value} onChange=${change}
        aria-label=${`Weight of ${name}, as a number`} />
    </span>`;
}
