// The aliases: names that stand for adapters or versions of them, for canaries, A/B tests and roll-back.

import { AliasEditor, describeTargets } from "./alias_editor.js";
import { call } from "./api.js";
import { Confirm } from "./dialogs.js";
import { counted, percent } from "./format.js";
import { shortTarget } from "./targets.js";
import { html, useState } from "./ui.js";

/** `editing`: what the editor begins with, or null; `onEdit` changes it. `onTry` gets the name of an alias. */
export function Aliases({ session, editing, onEdit, onTry }) {
  const [said, setSaid] = useState(null); // {text, problem}
  const [deleting, setDeleting] = useState(null);
  const { aliases, adapters, permissions } = session;
  const tell = (text, problem) => (setSaid({ text, problem }), session.refresh());

  const remove = async ({ name, etag }) => {
    try {
      await call("DELETE", `v1/aliases/${name}`, undefined, etag ? { "If-Match": `"${etag}"` } : {});
      tell(`The alias ${name} is deleted.`);
    } catch (error) {
      const changed = error.status === 412;
      tell(changed ? `Somebody else changed ${name} meanwhile. Look at it again before you delete it.` : error.message,
        true);
    }
  };
  return html`
    <section class="card" aria-labelledby="aliases-title">
      <div class="bar-row">
        <h2 id="aliases-title">${counted(aliases.length, "alias", "aliases")}</h2>
        <span class="spacer"></span>
        ${permissions.admin && adapters.length > 0 && html`
          <button type="button" onClick=${() => onEdit({ targets: [{ adapter: adapters[0].name, weight: 1 }] })}>
            New alias</button>`}
      </div>
      <p class="hint">An alias answers wherever an adapter's name does. An adapter's own name is its newest version.</p>
      <p class=${said?.problem ? "error" : "hint"} role="status">${said?.text ?? ""}</p>
      <ul class="aliases">
        ${aliases.map((alias) => html`
          <${Alias} key=${alias.name} alias=${alias} mayChange=${mayChange(permissions, alias, adapters)}
            onTry=${onTry} onEdit=${onEdit} onDelete=${setDeleting} />`)}
      </ul>
    </section>
    ${editing && html`
      <${AliasEditor} start=${editing} adapters=${adapters} onClose=${() => onEdit(null)}
        onSaved=${(info) => (onEdit(null), tell(`${info.name} stands for ${describeTargets(info)} now.`))} />`}
    ${deleting && html`
      <${Confirm} title=${`Delete the alias ${deleting.name}?`} action="Delete"
        onConfirm=${() => remove(deleting)} onClose=${() => setDeleting(null)}
        text="Requests for it are refused from then on. Its adapters stay, but versions that only it kept are deleted." />`}`;
}

/** Whether a key may change an alias: an admin key, and one that may use all that the alias stands for. */
export function mayChange(permissions, alias, adapters) {
  if (!permissions.admin || permissions.adapters === null) return permissions.admin;
  const usable = new Set(adapters.map((adapter) => adapter.name));
  return !alias.broken && alias.targets.every((target) => usable.has(target.adapter.split("@")[0]));
}

function Alias({ alias, mayChange: may, onTry, onEdit, onDelete }) {
  const { name, targets, sticky, broken } = alias;
  const total = targets.reduce((sum, target) => sum + target.weight, 0);
  return html`
    <li class="alias">
      <div class="title">
        <h3>${name}</h3>
        ${broken && html`<span class="badge bad">broken</span>`}
      </div>
      <ul class="targets" aria-label=${`Targets of ${name}`}>
        ${targets.map(({ adapter, weight }) => html`
          <li><code>${shortTarget(adapter)}</code>
            ${" "}<span class="hint">${weight ? percent(weight / total) : "only kept"}</span></li>`)}
        ${sticky && html`<li class="hint">sticky by ${sticky}</li>`}
      </ul>
      <div class="actions">
        ${!broken && html`
          <button type="button" aria-label=${`Try ${name}`} onClick=${() => onTry(name)}>Try</button>`}
        ${may && html`
          <button type="button" aria-label=${`Change ${name}`} onClick=${() => onEdit(alias)}>Change</button>
          <button type="button" class="danger quiet" aria-label=${`Delete ${name}`}
            onClick=${() => onDelete(alias)}>Delete</button>`}
      </div>
      ${broken && html`<p class="error">${broken}</p>`}
    </li>`;
}
