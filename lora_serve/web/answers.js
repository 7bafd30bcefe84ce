// One column of the playground: its turns, and how fast the last answer came.

import { count, counted, duration } from "./format.js";
import { pace } from "./generation.js";
import { Tokens } from "./tokens.js";
import { html, useEffect, useRef, useState } from "./ui.js";

const SPEAK = 3000; // ms between two announcements of streamed text

/** The turns of a column. A completion continues its prompt; a chat alternates. */
export function Turns({ turns, mode, name, empty }) {
  const last = turns.at(-1);
  const end = useRef();
  const text = last?.answer.text;
  useEffect(() => {
    const box = end.current.parentElement;
    if (box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
  }, [text, turns.length]);
  return html`
    <div class="turns ${mode}" role="region" aria-label=${`Answers of ${name}`} tabindex="0">
      ${!turns.length && html`<p class="empty">${empty}</p>`}
      ${turns.map((turn, index) => html`
        <div class="turn" key=${index}>
          <div class="prompt"><span class="unseen">Prompt: </span>${turn.prompt}</div>
          <${Answer} answer=${turn.answer} />
        </div>`)}
      <div ref=${end}></div>
    </div>
    ${last && html`<${Announcer} answer=${last.answer} name=${name} />`}
    <footer class="stats">
      ${last ? html`<${Speed} answer=${last.answer} />` : html`<span>No answer yet</span>`}
    </footer>`;
}

function Answer({ answer }) {
  return html`
    <div class="answer">
      <span class="unseen">Answer: </span>
      ${answer.reasoning && html`<details class="reasoning"><summary>Reasoning</summary>${answer.reasoning}</details>`}
      ${answer.tokens.length && !answer.reasoning
        ? html`<${Tokens} answer=${answer} />`
        : html`<span class="plain">${answer.text}</span>`}
      ${answer.running && html`<span class="caret" aria-hidden="true"></span>`}
      ${answer.error && html`<p class="error" role="alert">${answer.error}</p>`}
    </div>`;
}

function Speed({ answer }) {
  const speed = pace(answer);
  const ended = { stop: "", length: "reached max tokens", stopped: "stopped" }[answer.finish] ?? answer.finish;
  const parts = [
    answer.first !== null && ["first token", duration(answer.first)],
    speed !== null && ["", `${count(speed)} tokens/s`],
    answer.generated !== null && ["", counted(answer.generated, "token")],
    ended && ["", ended],
  ].filter(Boolean);
  return html`
    ${answer.running && answer.first === null && html`<span>Waiting…</span>`}
    ${parts.map(([label, value]) => html`<span>${label} <b>${value}</b></span>`)}
    ${answer.served && html`<code class="served" title="what answered">${answer.served}</code>`}`;
}

/** Tells screen readers what has been streamed: whole words every few seconds, the rest at the end. */
function Announcer({ answer, name }) {
  const [lines, setLines] = useState([]);
  const told = useRef(0);
  const tell = (all) => {
    const until = all ? answer.text.length : answer.text.lastIndexOf(" ");
    if (until <= told.current) return;
    const words = answer.text.slice(told.current, until);
    told.current = until;
    setLines((before) => [...before, words].slice(-20));
  };
  useEffect(() => {
    told.current = 0;
    setLines([]);
  }, [answer]);
  useEffect(() => {
    if (!answer.running) return void tell(true);
    const timer = setInterval(() => tell(false), SPEAK);
    return () => clearInterval(timer);
  }, [answer, answer.running]);
  return html`
    <div class="unseen" aria-live="polite">
      ${lines.map((line, index) => html`<span key=${index}>${index === 0 ? `${name}: ` : ""}${line} </span>`)}
    </div>`;
}
