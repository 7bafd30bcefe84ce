// What came of a job: a version of an adapter, which can be tried, downloaded, and given an alias.

import { AliasEditor, describeTargets } from "./alias_editor.js";
import { mayChange } from "./aliases.js";
import { Download } from "./download.js";
import { short } from "./format.js";
import { targetOf } from "./targets.js";
import { html, useState } from "./ui.js";

export function PublishedResult({ job, session, onTry, onProblem }) {
  const [alias, setAlias] = useState(""); // the one that is to stand for it; empty is a new one
  const [editing, setEditing] = useState(null);
  const [said, setSaid] = useState("");
  const { adapters, aliases, permissions } = session;
  const [name, digest] = job.adapter.split("@");
  const version = adapters.find((each) => each.name === name)?.versions.find((each) => each.digest.startsWith(digest));
  const movable = aliases.filter((each) => mayChange(permissions, each, adapters));
  const edit = () =>
    setEditing({
      ...movable.find((each) => each.name === alias),
      targets: [{ adapter: targetOf(name, version.digest), weight: 1 }],
    });
  const saved = (info) => {
    setEditing(null);
    setSaid(`${info.name} stands for ${describeTargets(info)} now.`);
    session.refresh();
  };
  return html`
    <div class="result stack">
      <p>Published as the adapter <code>${name}@${short(digest)}</code>, and as the model
        ${" "}<code>${job.fine_tuned_model}</code>.</p>
      ${version && html`
        <div class="actions start">
          <button type="button" onClick=${() => onTry(name)}>Open in the playground</button>
          <select aria-label="Alias" value=${alias} onChange=${(event) => setAlias(event.target.value)}>
            <option value="">New alias</option>
            ${movable.map((each) => html`<option value=${each.name}>${each.name}</option>`)}
          </select>
          <button type="button" onClick=${edit}>Let it stand for this…</button>
          <${Download} path=${`v1/adapters/${name}/files?version=${version.digest}`} text="Download"
            file=${`${name}-${short(digest)}.tar`} label=${`Download ${name}@${short(digest)}`} onProblem=${onProblem} />
        </div>`}
      <p class="good" role="status">${said}</p>
    </div>
    ${editing && html`
      <${AliasEditor} start=${editing} adapters=${adapters} onSaved=${saved}
        onClose=${() => setEditing(null)} />`}`;
}
