// The server's report on an adapter, at upload and in the list.

import { bytes } from "./format.js";
import { html } from "./ui.js";

/** `found`: a version or an inspection. */
export function Report({ found }) {
  const { report } = found;
  const settings = found.settings ?? {}; // of requests that name it
  const facts = [
    ["Method", [report.method, ...(report.features ?? [])].join(", ")],
    ["Rank", (report.ranks ?? [found.rank]).join(", ")],
    ["Modules", report.modules ?? found.modules],
    ["Trained on", report.base_model_name_or_path],
    ["Served as", (report.lowered ?? []).join(", ")],
    ["In memory", bytes(found.memory_bytes)],
    ["On disk", bytes(found.file_bytes)],
    ["Composable", report.composable === false ? "no: used alone, with weight 1" : "yes"],
    ["Digest", html`<code class="digest">${found.digest}</code>`],
  ];
  return html`
    <dl class="facts">
      ${facts.filter(([, value]) => value).map(([label, value]) => html`<div><dt>${label}</dt><dd>${value}</dd></div>`)}
    </dl>
    ${Object.keys(settings).length > 0 && html`
      <dl class="facts settings" aria-label="Settings">
        ${Object.entries(settings).map(([name, value]) => html`
          <div><dt>${name}</dt><dd><pre tabindex="0">${typeof value === "string" ? value : JSON.stringify(value)}</pre></dd></div>`)}
      </dl>`}
    ${report.warnings?.length > 0 && html`
      <ul class="warnings" aria-label="Warnings">${report.warnings.map((warning) => html`<li>${warning}</li>`)}</ul>`}`;
}
