// The API reference: the server's own OpenAPI schema, and a form to try each route.

import { ApiError, ROOT, attempt, call, hasKey } from "./api.js";
import { Dialog, KeyForm } from "./dialogs.js";
import { Fields, example, prose, typeOf } from "./schema.js";
import { Brand, KeyCard } from "./shell.js";
import { classes, html, render, useEffect, useState } from "./ui.js";

function Reference() {
  const [state, setState] = useState({});
  const [filter, setFilter] = useState("");
  const [asksKey, setAsksKey] = useState(false);
  const load = async () => {
    try {
      setState({ root: await call("GET", "openapi.json") });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setState({ problem: error.message, needsKey: error.status === 401 });
    }
  };
  useEffect(() => void load(), []);
  const { root, problem, needsKey } = state;
  const groups = root ? byTag(root, filter.toLowerCase()) : [];
  return html`
    <header class="top">
      <${Brand} />
      <nav aria-label="Views">
        <a href=".#playground">Playground</a> <a href=".#adapters">Adapters</a> <a href=".#charts">Charts</a>
        <a href="docs" aria-current="page">API</a>
      </nav>
      ${root && html`<span class="model">version ${root.info.version}</span>`}
      ${(needsKey || hasKey()) && html`
        <button type="button" class="quiet key" onClick=${() => setAsksKey(true)}>Key</button>`}
    </header>
    <main>
      ${needsKey && html`<${KeyCard} problem=${hasKey() ? problem : null} onDone=${load} />`}
      ${problem && !needsKey && html`<p class="notice" role="alert">${problem}</p>`}
      ${root && html`
        <div class="bar-row">
          <h1>API reference</h1><span class="spacer"></span>
          <a href="openapi.json" onClick=${download}>openapi.json</a>
          <input type="search" placeholder="Filter routes" aria-label="Filter routes" value=${filter}
            onInput=${(event) => setFilter(event.target.value)} />
        </div>
        ${groups.map(([tag, operations]) => html`
          <section class="card" key=${tag} aria-labelledby=${`tag-${tag}`}>
            <h2 id=${`tag-${tag}`}>${tag}</h2>
            ${operations.map((operation) => html`<${Operation} key=${operation.id} ...${operation} root=${root} />`)}
          </section>`)}`}
    </main>
    ${asksKey && html`
      <${Dialog} title="API key" onClose=${() => setAsksKey(false)}>
        <${KeyForm} onDone=${() => (setAsksKey(false), load())} />
      <//>`}`;
}

/** Save the schema; a link alone would not send the key. */
async function download(event) {
  event.preventDefault();
  const { text } = await attempt("GET", "openapi.json");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "openapi.json";
  link.click();
}

function byTag(root, filter) {
  const groups = new Map();
  for (const [path, methods] of Object.entries(root.paths)) {
    for (const [method, spec] of Object.entries(methods)) {
      if (!`${method} ${path} ${spec.summary}`.toLowerCase().includes(filter)) continue;
      const tag = spec.tags?.[0] ?? "other";
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push({ id: `${method} ${path}`, method, path, spec });
    }
  }
  return [...groups];
}

function Operation({ method, path, spec, root }) {
  const [open, setOpen] = useState(false);
  const body = Object.entries(spec.requestBody?.content ?? {})[0];
  return html`
    <details class="operation" onToggle=${(event) => setOpen(event.target.open)}>
      <summary><span class=${classes("method", method)}>${method.toUpperCase()}</span> <code>${path}</code>
        <span class="hint">${spec.summary}</span></summary>
      ${open && html`
        <div class="stack">
          ${spec.description && html`<p>${prose(spec.description)}</p>`}
          ${spec.parameters?.length > 0 && html`
            <h3>Parameters</h3>
            <ul class="fields">${spec.parameters.map((each) => html`
              <li><code>${each.name}</code> <span class="type">${typeOf(each.schema, root)}, in ${each.in}</span>
                ${each.description && html`<p class="hint">${each.description}</p>`}</li>`)}</ul>`}
          ${body && html`
            <h3>Body <span class="hint">${body[0]}</span></h3>
            <${Fields} schema=${body[1].schema} root=${root} marked />`}
          <h3>Responses</h3>
          <ul class="fields">${Object.entries(spec.responses).map(([status, response]) => html`
            <li><code>${status}</code> <span class="type">${response.description}</span>
              ${status < "3" && Object.entries(response.content ?? {}).slice(0, 1).map(([, { schema }]) => html`
                <${Fields} schema=${schema} root=${root} />`)}</li>`)}</ul>
          ${(!body || body[0] === "application/json") && html`
            <${Try} method=${method} path=${path} spec=${spec} schema=${body?.[1].schema} root=${root} />`}
        </div>`}
    </details>`;
}

function Try({ method, path, spec, schema, root }) {
  const [values, setValues] = useState({});
  const [body, setBody] = useState(schema ? JSON.stringify(example(schema, root), null, 2) : "");
  const [reply, setReply] = useState(null);
  const parameters = (spec.parameters ?? []).filter((each) => each.in !== "header");
  const send = async (event) => {
    event.preventDefault();
    const filled = path.replace(/\{(\w+)(:path)?\}/g, (_, name) => encodeURIComponent(values[name] ?? ""));
    const url = new URL(filled.slice(1), ROOT);
    for (const { name, in: place } of parameters) {
      if (place === "query" && values[name]) url.searchParams.set(name, values[name]);
    }
    setReply({ text: "…" });
    try {
      setReply(await attempt(method.toUpperCase(), url, body || undefined));
    } catch (error) {
      setReply({ text: error.message });
    }
  };
  return html`
    <form class="stack try" onSubmit=${send}>
      <h3>Try it</h3>
      ${parameters.map(({ name, required }) => html`
        <label class="field">${name}
          <input required=${required} value=${values[name] ?? ""}
            onInput=${(event) => setValues({ ...values, [name]: event.target.value })} />
        </label>`)}
      ${schema && html`
        <label class="field">Body
          <textarea class="mono" rows=${Math.min(14, body.split("\n").length + 1)} spellcheck=${false} value=${body}
            onInput=${(event) => setBody(event.target.value)}></textarea>
        </label>`}
      <div class="actions start"><button class="primary">Send</button></div>
      <div role="status">${reply && html`
        ${reply.status && html`<p><b>${reply.status}</b> <span class="hint">${reply.type}</span></p>`}
        <pre class="code" tabindex="0" aria-label="Response">${pretty(reply.text)}</pre>`}</div>
    </form>`;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

render(html`<${Reference} />`, document.getElementById("app"));
