// The page: header, views, and the key.

import { AdaptersView } from "./adapters.js";
import { hasKey } from "./api.js";
import { ChartsView } from "./charts.js";
import { Dialog, KeyForm } from "./dialogs.js";
import { Playground } from "./playground.js";
import { useMetrics } from "./series.js";
import { useSession } from "./session.js";
import { Brand, KeyCard } from "./shell.js";
import { TrainingView } from "./training.js";
import { html, render, useEffect, useRef, useState } from "./ui.js";

const VIEWS = { playground: "Playground", adapters: "Adapters", training: "Training", charts: "Charts" };

const viewOf = () => (location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "playground");

function App() {
  const session = useSession();
  const [view, setView] = useState(viewOf());
  const [asksKey, setAsksKey] = useState(false);
  const [tried, setTried] = useState(null); // the adapter that was chosen in the list, for the playground
  const main = useRef();
  const ready = session.state === "ready";
  const metrics = useMetrics(ready && session.permissions.metrics);

  useEffect(() => {
    const change = () => {
      setView(viewOf());
      main.current.focus({ preventScroll: true });
    };
    addEventListener("hashchange", change);
    return () => removeEventListener("hashchange", change);
  }, []);
  useEffect(() => {
    document.title = `${VIEWS[view]} · lora-serve`;
  }, [view]);

  const tryOut = (name) => {
    setTried({ name });
    location.hash = "playground";
  };
  const keyed = session.state === "key" || hasKey();
  return html`
    <header class="top">
      <a class="skip" href="#main" onClick=${(event) => (event.preventDefault(), main.current.focus())}>
        Skip to the content
      </a>
      <${Brand} />
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(([name, title]) => html`
          <a href="#${name}" aria-current=${view === name ? "page" : undefined}>${title}</a>`)}
        <a href="docs">API</a>
      </nav>
      ${ready && html`<span class="model" title=${session.model.root}>${session.model.id}</span>`}
      ${keyed && html`
        <button type="button" class="quiet key" onClick=${() => setAsksKey(true)}>
          ${(ready && session.permissions.name) || "Key"}
        </button>`}
    </header>
    <main ref=${main} tabindex="-1" id="main">
      ${session.state === "connecting" && html`<p class="notice" role="status">Connecting…</p>`}
      ${session.state === "down" && html`<p class="notice" role="status">${session.problem} Trying again…</p>`}
      ${session.state === "key" && html`<${KeyCard} problem=${session.problem} onDone=${session.connect} />`}
      ${ready && session.problem && html`<p class="error" role="status">${session.problem} Trying again…</p>`}
      ${ready && html`
        <div hidden=${view !== "playground"}><${Playground} session=${session} tried=${tried} /></div>
        ${view === "adapters" && html`
          <${AdaptersView} session=${session} metrics=${metrics} onTry=${tryOut} />`}
        ${view === "training" && html`<${TrainingView} session=${session} onTry=${tryOut} />`}
        ${view === "charts" && html`<${ChartsView} session=${session} metrics=${metrics} />`}`}
    </main>
    ${asksKey && html`
      <${Dialog} title="API key" onClose=${() => setAsksKey(false)}>
        <${KeyForm} onDone=${() => (setAsksKey(false), session.connect())} />
      <//>`}`;
}

render(html`<${App} />`, document.getElementById("app"));
