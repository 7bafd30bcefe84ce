// The adapters: where they are, what they are, and what an admin may do with them.

import { Aliases, mayChange } from "./aliases.js";
import { call } from "./api.js";
import { Confirm } from "./dialogs.js";
import { Download } from "./download.js";
import { ago, bytes, count, counted, short } from "./format.js";
import { Report } from "./report.js";
import { Residency, TierPicture } from "./residency.js";
import { pointedAt, targetOf } from "./targets.js";
import { html, useState } from "./ui.js";
import { Upload } from "./upload.js";

export function AdaptersView({ session, metrics, onTry }) {
  const [filter, setFilter] = useState("");
  const [said, setSaid] = useState(null); // {text, problem}
  const [deleting, setDeleting] = useState(null);
  const [editing, setEditing] = useState(null); // the alias that is changed, or a new one
  const { adapters, aliases, permissions } = session;
  const movable = aliases.filter((alias) => mayChange(permissions, alias, adapters));
  const shown = adapters.filter((adapter) => adapter.name.toLowerCase().includes(filter.toLowerCase()));

  const act = async (name, method, path, done) => {
    setSaid({ text: "…" });
    try {
      await call(method, path);
      setSaid({ text: `${name} ${done}.` });
    } catch (error) {
      setSaid({ text: error.message, problem: true });
    }
    session.refresh();
  };
  const change = (name, action, done) => act(name, "POST", `v1/adapters/${name}/${action}`, done);
  const remove = (name) => act(name, "DELETE", `v1/adapters/${name}`, "is deleted");

  return html`
    <h1>Adapters</h1>
    <${Residency} adapters=${adapters} latest=${metrics.latest} />
    ${permissions.admin
      ? html`<${Upload} adapters=${adapters} onPublished=${session.refresh} />`
      : html`<p class="hint">This key may look at adapters and use them. Changing them needs an admin key.</p>`}
    <section class="card" aria-labelledby="list-title">
      <div class="bar-row">
        <h2 id="list-title">${count(adapters.length)} published</h2>
        <span class="spacer"></span>
        <input type="search" placeholder="Filter by name" aria-label="Filter by name" value=${filter}
          onInput=${(event) => setFilter(event.target.value)} />
      </div>
      <p class=${said?.problem ? "error" : "hint"} role="status">${said?.text ?? ""}</p>
      ${!shown.length && html`
        <p class="empty">${adapters.length ? "No name has this in it." : "Nothing is published yet."}</p>`}
      <ul class="adapters">
        ${shown.map((adapter) => html`
          <${Adapter} key=${adapter.name} adapter=${adapter} admin=${permissions.admin} latest=${metrics.latest}
            aliases=${movable} onTry=${onTry} onChange=${change} onDelete=${setDeleting} onEdit=${setEditing}
            onProblem=${(text) => setSaid({ text, problem: true })} />`)}
      </ul>
    </section>
    <${Aliases} session=${session} editing=${editing} onEdit=${setEditing} onTry=${onTry} />
    ${deleting && html`
      <${Confirm} title=${`Delete ${deleting}?`} action="Delete"
        onConfirm=${() => remove(deleting)} onClose=${() => setDeleting(null)}
        text="All its versions are deleted once running requests have finished. This cannot be undone." />`}`;
}

function Adapter({ adapter, admin, latest, aliases, onTry, onChange, onDelete, onEdit, onProblem }) {
  const { name, pinned, broken, versions } = adapter;
  const [open, setOpen] = useState(false);
  const [newest] = versions;
  const used = (what) => latest.value(`lora_serve_adapter_${what}_total`, { adapter: name });
  const resident = newest?.tiers.some((tier) => tier !== "disk");
  const action = (label, does, done, off) => html`
    <button type="button" aria-label=${`${label} ${name}`} disabled=${off} onClick=${() => onChange(name, does, done)}>
      ${label}
    </button>`;
  return html`
    <li class="adapter">
      <div class="line">
        <div class="title">
          <h3>${name}</h3>
          ${pinned && html`<span class="badge">pinned</span>`}
          ${broken && html`<span class="badge bad">broken</span>`}
          ${newest?.leases > 0 && html`<span class="badge live">in use</span>`}
        </div>
        ${newest && html`
          <${TierPicture} tiers=${newest.tiers} />
          <p class="hint about">
            ${newest.report.method ?? "adapter"} · rank ${newest.rank} · ${bytes(newest.memory_bytes)} ·
            ${" "}${counted(versions.length, "version")}
            ${latest ? ` · ${counted(used("requests"), "request")}, ${counted(used("tokens"), "token")}` : ""}
          </p>`}
        <div class="actions">
          ${newest && html`<button type="button" aria-label=${`Try ${name}`} onClick=${() => onTry(name)}>Try</button>`}
          ${admin && newest && html`
            ${action("Load", "load", "is in memory", newest.tiers.includes("host"))}
            ${action("Evict", "evict", "left memory", !resident || pinned)}
            ${pinned ? action("Unpin", "unpin", "may be evicted again") : action("Pin", "pin", "stays in memory")}`}
          ${admin && html`
            <button type="button" class="danger quiet" aria-label=${`Delete ${name}`}
              onClick=${() => onDelete(name)}>Delete</button>`}
        </div>
      </div>
      ${broken && html`<p class="error">${broken}</p>`}
      ${newest && html`
        <details onToggle=${(event) => setOpen(event.target.open)}>
          <summary>Versions and report<span class="unseen"> of ${name}</span></summary>
          ${open && versions.map((version, index) => html`
            <section class="version" aria-label=${`Version ${short(version.digest)}`}>
              <h4><code>${name}@${short(version.digest)}</code> <${TierPicture} tiers=${version.tiers} />
                <span class="hint">${index ? "" : "newest, "}published ${ago(version.created)}${
                  version.last_used ? `, used ${ago(version.last_used)}` : ""}${
                  version.leases ? `, ${version.leases} running` : ""}</span></h4>
              ${admin && html`
                <${VersionActions} name=${name} version=${version} isNewest=${index === 0} aliases=${aliases}
                  onEdit=${onEdit} onProblem=${onProblem} />`}
              <${Report} found=${version} />
            </section>`)}
        </details>`}
    </li>`;
}

/** Download a version, or let an alias stand for it: of an older one, that is to roll back. */
function VersionActions({ name, version, isNewest, aliases, onEdit, onProblem }) {
  const target = targetOf(name, version.digest);
  const shown = `${name}@${short(version.digest)}`;
  const naming = aliases.filter(({ targets }) => targets.some(({ adapter }) => adapter.split("@")[0] === name));
  const point = (alias) => onEdit({ ...alias, targets: pointedAt(alias.targets, name, version.digest) });
  return html`
    <div class="actions start">
      <${Download} path=${`v1/adapters/${name}/files?version=${version.digest}`} text="Download"
        file=${`${name}-${short(version.digest)}.tar`} label=${`Download ${shown}`} onProblem=${onProblem} />
      ${naming.map((alias) => {
        const label = `${isNewest ? "Move" : "Roll back"} ${alias.name}`;
        return alias.targets.some(({ adapter }) => adapter === target)
          ? html`<span class="badge">${alias.name} stands for it</span>`
          : html`
            <button type="button" aria-label=${`${label} to ${shown}`} onClick=${() => point(alias)}>
              ${label} to it</button>`;
      })}
      <button type="button" class="quiet" aria-label=${`New alias for ${shown}`}
        onClick=${() => onEdit({ targets: [{ adapter: target, weight: 1 }] })}>New alias for it</button>
    </div>`;
}
