// The playground: one prompt, answered by one choice of adapters or by two side by side.

import { ROOT, hasKey } from "./api.js";
import { Turns } from "./answers.js";
import { AdapterChoice } from "./choice.js";
import { CopyDialog } from "./dialogs.js";
import { asCurl, generate, newAnswer, requestOf } from "./generation.js";
import { DEFAULTS, Settings } from "./settings.js";
import { classes, html, useEffect, useReducer, useRef, useState } from "./ui.js";

const WIDE = matchMedia("(min-width: 62rem)");

const newColumn = (choice = []) => ({ choice, turns: [] });

/** Columns are changed in place, at every token; they are drawn once a frame. */
function useColumns(adapters) {
  const [, draw] = useReducer((drawn) => drawn + 1, 0);
  const columns = useRef(null);
  const frame = useRef(0);
  columns.current ??= [newColumn(), ...(adapters.length ? [newColumn([{ name: adapters[0].name, weight: 1 }])] : [])];
  const changed = () => {
    frame.current ||= requestAnimationFrame(() => ((frame.current = 0), draw()));
  };
  return [columns.current, changed];
}

export function Playground({ session, tried }) {
  const served = session.adapters.filter((adapter) => !adapter.broken);
  const [columns, changed] = useColumns(served);
  const [mode, setMode] = useState(session.hasTemplate ? "chat" : "completion");
  const [prompt, setPrompt] = useState("");
  const [settings, setSettings] = useState(DEFAULTS);
  const [curl, setCurl] = useState(null);
  const stopping = useRef(null);
  const field = useRef();
  const running = columns.some((column) => column.turns.at(-1)?.answer.running);

  useEffect(() => {
    if (!tried) return;
    columns[columns.length - 1].choice = [{ name: tried.name, weight: 1 }];
    changed();
    field.current.focus();
  }, [tried]);

  const clear = () => {
    stopping.current?.abort();
    for (const column of columns) column.turns = [];
    changed();
  };
  const requests = () => columns.map((column) => requestOf(mode, prompt, column.turns, column.choice, settings));
  const send = () => {
    if (running || !prompt.trim()) return;
    stopping.current = new AbortController();
    const sent = requests();
    columns.forEach((column, index) => {
      const answer = newAnswer();
      column.turns = [...(mode === "chat" ? column.turns : []), { prompt, answer }];
      generate(sent[index], answer, stopping.current.signal, changed);
    });
    if (mode === "chat") setPrompt("");
    changed();
  };
  const press = (event) => {
    if (event.key === "Escape" && running) stopping.current.abort();
    const sends = event.ctrlKey || event.metaKey || (mode === "chat" && !event.shiftKey);
    if (event.key === "Enter" && sends && !event.isComposing) {
      event.preventDefault();
      send();
    }
  };
  const compare = () => {
    if (columns.length === 2) columns.pop();
    else columns.push(newColumn(served.length ? [{ name: served[0].name, weight: 1 }] : []));
    changed();
  };

  const modes = [["chat", "Chat"], ["completion", "Completion"]];
  return html`
    <h1 class="unseen">Playground</h1>
    <div class="playground">
      <div class="bench">
        <div class="bar-row">
          <div class="switch" role="group" aria-label="Kind of prompt">
            ${modes.map(([name, title]) => html`
              <button type="button" aria-pressed=${mode === name}
                onClick=${() => (mode !== name && clear(), setMode(name))}>${title}</button>`)}
          </div>
          <button type="button" aria-pressed=${columns.length === 2} class="toggle" onClick=${compare}>
            Side by side
          </button>
          <span class="spacer"></span>
          <button type="button" class="quiet" onClick=${clear}
            disabled=${!columns.some((column) => column.turns.length)}>
            Clear
          </button>
          <button type="button" class="quiet" disabled=${!prompt.trim() && !columns[0].turns.length}
            onClick=${() => setCurl(curlOf(columns, requests(), prompt, mode, settings))}>Copy as curl</button>
        </div>
        <div class=${classes("columns", columns.length === 2 && "two")}>
          ${columns.map((column, index) => html`
            <section class="card column" key=${index}
              aria-label=${columns.length === 2 ? `Column ${"AB"[index]}` : "Answer"}>
              <${AdapterChoice} label=${columns.length === 2 ? `Adapter of column ${"AB"[index]}` : "Adapter"}
                choice=${column.choice} adapters=${session.adapters} aliases=${session.aliases}
                onChange=${(change) => ((column.choice = change(column.choice)), changed())} />
              <${Turns} turns=${column.turns} mode=${mode} name=${nameOf(column, session)}
                empty=${index ? "The same prompt, answered with this." : "Answers appear here, token by token."} />
            </section>`)}
        </div>
        <form class="card composer" onSubmit=${(event) => (event.preventDefault(), send())}>
          <label class="unseen" for="prompt">${mode === "chat" ? "Message" : "Prompt"}</label>
          <textarea id="prompt" ref=${field} rows=${mode === "chat" ? 2 : 4} value=${prompt} onKeyDown=${press}
            placeholder=${mode === "chat" ? "Message (Enter sends)" : "A text to continue (Ctrl+Enter sends)"}
            onInput=${(event) => setPrompt(event.target.value)}></textarea>
          ${running
            ? html`<button type="button" class="danger" onClick=${() => stopping.current.abort()}>Stop</button>`
            : html`<button class="primary" disabled=${!prompt.trim()}>Send</button>`}
        </form>
      </div>
      <details class="card settings" open=${WIDE.matches}>
        <summary>Settings</summary>
        <${Settings} mode=${mode} settings=${settings} onChange=${setSettings} />
      </details>
    </div>
    ${curl && html`<${CopyDialog} title="As curl" text=${curl} onClose=${() => setCurl(null)} />`}`;
}

const nameOf = (column, session) => column.choice.map((each) => each.name).join(" + ") || session.model.id;

/** What would be sent now; with an empty prompt, what was sent last. */
function curlOf(columns, requests, prompt, mode, settings) {
  const sent = prompt.trim()
    ? requests
    : columns.map(({ choice, turns }) => requestOf(mode, turns.at(-1).prompt, turns.slice(0, -1), choice, settings));
  return sent.map((request) => asCurl(request, ROOT, hasKey())).join("\n\n");
}
