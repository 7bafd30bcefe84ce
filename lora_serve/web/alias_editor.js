// The editor of an alias: what it stands for, by weight. It never writes over a change that it has not shown.

import { call } from "./api.js";
import { Dialog } from "./dialogs.js";
import { percent } from "./format.js";
import { NumberField } from "./number_field.js";
import { shortTarget, targetOf } from "./targets.js";
import { html, useState } from "./ui.js";

const MOST_TARGETS = 16;
const HEADER = "header:";

/** What an alias stands for, in words. */
export function describeTargets({ targets }) {
  const total = targets.reduce((sum, target) => sum + target.weight, 0);
  const words = targets.map(({ adapter, weight }) =>
    targets.length > 1 ? `${shortTarget(adapter)} (${percent(weight / total)})` : shortTarget(adapter));
  return words.join(", ") || "nothing that can be read";
}

/** `start`: an alias, or a new one, which has no name. `onSaved` gets the alias. */
export function AliasEditor({ start, adapters, onClose, onSaved }) {
  const isNew = !start.name;
  const [name, setName] = useState(start.name ?? "");
  const [targets, setTargets] = useState(start.targets);
  const [sticky, setSticky] = useState(start.sticky ?? "");
  const [condition, setCondition] = useState(isNew ? { "If-None-Match": "*" } : matching(start));
  const [problem, setProblem] = useState(null);
  const [theirs, setTheirs] = useState(null); // the alias as somebody else has changed it
  const total = targets.reduce((sum, target) => sum + (target.weight ?? 0), 0);
  const choices = choicesOf(adapters, targets);
  const left = choices.find((choice) => !targets.some((target) => target.adapter === choice));
  const set = (index, change) =>
    setTargets((before) => before.map((each, at) => (at === index ? { ...each, ...change } : each)));

  const explainConflict = async () => {
    const found = (await call("GET", "v1/aliases")).data.find((alias) => alias.name === name);
    setTheirs(found ?? null);
    setCondition(found ? matching(found) : { "If-None-Match": "*" });
    const now = found && `it stands for ${describeTargets(found)}`;
    if (!found) setProblem(`Somebody else deleted ${name} meanwhile. Save again to make it anew.`);
    else if (isNew && !theirs) setProblem(`${name} exists already: ${now}. Save again to replace that by yours.`);
    else setProblem(`Somebody else changed ${name} meanwhile: ${now} now. Save again to replace that by yours.`);
  };
  const save = async (event) => {
    event.preventDefault();
    setProblem(null);
    try {
      onSaved(await call("PUT", `v1/aliases/${name}`, { targets, sticky: sticky || null }, condition));
    } catch (error) {
      if (error.status === 412) await explainConflict().catch((failure) => setProblem(failure.message));
      else setProblem(error.message);
    }
  };
  const takeTheirs = () => {
    setTargets(theirs.targets);
    setSticky(theirs.sticky ?? "");
    setTheirs(null);
    setProblem(null);
  };

  return html`
    <${Dialog} title=${isNew ? "New alias" : `Change ${name}`} onClose=${onClose}>
      <form class="stack" onSubmit=${save}>
        ${isNew && html`
          <label class="field">Name
            <input value=${name} required autofocus maxlength="64" pattern="[A-Za-z0-9][A-Za-z0-9._\\-]*"
              spellcheck=${false} autocomplete="off" onInput=${(event) => setName(event.target.value)} />
          </label>`}
        <fieldset class="stack">
          <legend>Stands for</legend>
          ${targets.map((target, index) => html`
            <div class="target" key=${index}>
              <select aria-label=${`Target ${index + 1}`} value=${target.adapter}
                onChange=${(event) => set(index, { adapter: event.target.value })}>
                ${choices.map((choice) => html`<option value=${choice}>${shortTarget(choice)}</option>`)}
              </select>
              <${NumberField} min="0" max="1000000" step="any" required value=${target.weight}
                aria-label=${`Weight of target ${index + 1}`} onChange=${(weight) => set(index, { weight })} />
              <span class="hint">${total > 0 ? percent((target.weight ?? 0) / total) : ""}</span>
              ${targets.length > 1 && html`
                <button type="button" class="quiet" aria-label=${`Remove target ${index + 1}`}
                  onClick=${() => setTargets((before) => before.filter((_, at) => at !== index))}>✕</button>`}
            </div>`)}
          ${left && targets.length < MOST_TARGETS && html`
            <div class="actions start">
              <button type="button" class="quiet"
                onClick=${() => setTargets([...targets, { adapter: left, weight: 1 }])}>+ Add a target</button>
            </div>`}
          <p class="hint">A name without a version is always its newest one. At weight 0 a version is only kept.</p>
        </fieldset>
        <${Stickiness} value=${sticky} onChange=${setSticky} />
        ${problem && html`<p class="error" role="alert">${problem}</p>`}
        <div class="actions">
          <button type="button" onClick=${onClose}>Cancel</button>
          ${theirs && html`<button type="button" onClick=${takeTheirs}>Take theirs</button>`}
          <button class="primary" autofocus=${!isNew}>Save</button>
        </div>
      </form>
    <//>`;
}

/** What keeps a client on a target: nothing, the request's `user`, or a header. */
function Stickiness({ value, onChange }) {
  const kind = value.startsWith(HEADER) ? HEADER : value;
  return html`
    <label class="field">A client stays on its target
      <select value=${kind} onChange=${(event) => onChange(event.target.value)}>
        <option value="">never: each request is on its own</option>
        <option value="user">by the request's field “user”</option>
        <option value=${HEADER}>by a header of the request</option>
      </select>
    </label>
    ${kind === HEADER && html`
      <label class="field">Header
        <input value=${value.slice(HEADER.length)} required maxlength="100" spellcheck=${false} autocomplete="off"
          placeholder="X-Session" onInput=${(event) => onChange(HEADER + event.target.value)} />
      </label>`}`;
}

/** A condition that holds while nobody else has changed an alias; none for one that cannot be read. */
const matching = ({ etag }) => (etag ? { "If-Match": `"${etag}"` } : {});

/** What a target can be: names, their versions, and what the alias stands for now. */
function choicesOf(adapters, targets) {
  const offered = adapters.flatMap(({ name, versions }) =>
    [name, ...versions.map((version) => targetOf(name, version.digest))]);
  return [...new Set([...offered, ...targets.map((target) => target.adapter)])];
}
