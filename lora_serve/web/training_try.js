// One prompt, answered by the base and by what a job has trained so far.

import { Turns } from "./answers.js";
import { call } from "./api.js";
import { count } from "./format.js";
import { generate, newAnswer, requestOf } from "./generation.js";
import { html, newId, useEffect, useMemo, useReducer, useRef, useState } from "./ui.js";

const NOW = "now"; // a checkpoint that is yet to be made
const SETTINGS = { max_tokens: 256, temperature: 0 }; // so that two answers can be compared

/** What can be tried, the best first: the models' names and how they are called here. */
function choicesOf(job, checkpoints, isRunning) {
  return [
    ...(job.fine_tuned_model ? [[job.fine_tuned_model, "the result"]] : []),
    ...checkpoints.map((each) => [each.fine_tuned_model_checkpoint, `step ${count(each.step_number)}`]),
    ...(isRunning ? [[NOW, "as it is now"]] : []),
  ];
}

/** `newest`: the last step that is known; checkpoints are looked for when it changes. */
export function TryBesideBase({ job, session, isRunning, newest }) {
  const [checkpoints, setCheckpoints] = useState([]);
  const [chosen, setChosen] = useState(null); // null: the best
  const [prompt, setPrompt] = useState("");
  const [system, setSystem] = useState("");
  const [asked, setAsked] = useState(null); // {prompt, label, base, trained}: two answers, which are changed in place
  const [, draw] = useReducer((drawn) => drawn + 1, 0);
  const stopping = useRef(null);
  const frame = useRef(0);
  const ids = useMemo(() => ({ title: newId("try"), prompt: newId("prompt") }), []);
  const path = `v1/fine_tuning/jobs/${job.id}/checkpoints`;
  const choices = choicesOf(job, checkpoints, isRunning);
  const [model, label] = choices.find(([name]) => name === chosen) ?? choices[0] ?? [null, ""];
  const isChat = session.hasTemplate && job.training.training_data.kind !== "completion";
  const mode = isChat ? "chat" : "completion";
  const isAsking = asked && (asked.base.running || asked.trained.running);

  const look = async () => {
    try {
      setCheckpoints((await call("GET", path)).data);
    } catch {
      setCheckpoints([]); // the list of jobs says what is wrong
    }
  };
  useEffect(() => void look(), [newest, job.status]);
  useEffect(() => () => stopping.current?.abort(), []);

  const changed = () => {
    frame.current ||= requestAnimationFrame(() => ((frame.current = 0), draw()));
  };
  const answerOf = (name, answer) => {
    const { path: route, body } = requestOf(mode, prompt, [], [], { ...SETTINGS, system });
    const request = { path: route, body: name ? { model: name, ...body } : body };
    return generate(request, answer, stopping.current.signal, changed);
  };
  /** The name of a checkpoint that is made now, and how it is called; null if none can be, which the answer says. */
  const makeCheckpoint = async (answer) => {
    try {
      const made = await call("POST", path);
      look();
      return [made.fine_tuned_model_checkpoint, `step ${count(made.step_number)}`];
    } catch (error) {
      Object.assign(answer, { running: false, error: error.message });
      changed();
      return null;
    }
  };
  const ask = async () => {
    if (isAsking || !model || !prompt.trim()) return;
    stopping.current = new AbortController();
    const both = { prompt, label, base: newAnswer(), trained: newAnswer() };
    setAsked(both);
    answerOf(null, both.base);
    const found = model === NOW ? await makeCheckpoint(both.trained) : [model, label];
    if (!found) return;
    both.label = found[1];
    answerOf(found[0], both.trained);
  };
  const press = (event) => {
    const sends = event.ctrlKey || event.metaKey || (isChat && !event.shiftKey);
    if (event.key === "Enter" && sends && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  };

  if (!choices.length && job.finished_at) return null;
  return html`
    <section class="stack try" aria-labelledby=${ids.title}>
      <h3 id=${ids.title}>Try it beside the base</h3>
      ${!choices.length && html`
        <p class="hint">There is nothing to try yet: checkpoints are made while the job trains.</p>`}
      ${choices.length > 0 && html`
        <form class="stack" onSubmit=${(event) => (event.preventDefault(), ask())}>
          <div class="grid">
            <label class="field">What is tried
              <select value=${model} onChange=${(event) => setChosen(event.target.value)}>
                ${choices.map(([name, title]) => html`<option value=${name}>${title}</option>`)}
              </select>
            </label>
            ${isChat && html`
              <label class="field">System prompt
                <input value=${system} placeholder="none" onInput=${(event) => setSystem(event.target.value)} />
              </label>`}
          </div>
          <label class="unseen" for=${ids.prompt}>${isChat ? "Message to both" : "Prompt for both"}</label>
          <div class="ask">
            <textarea id=${ids.prompt} rows="2" value=${prompt} onKeyDown=${press}
              placeholder=${isChat ? "Message to both (Enter sends)" : "Prompt for both (Ctrl+Enter sends)"}
              onInput=${(event) => setPrompt(event.target.value)}></textarea>
            <button class="primary" disabled=${isAsking || !prompt.trim()}>Ask both</button>
          </div>
          ${model !== job.fine_tuned_model && html`
            <p class="hint">${model === NOW && "A checkpoint is made for it, after the step that runs. "}A checkpoint
              that was tried is an adapter, too, until it is deleted there.</p>`}
        </form>`}
      ${asked && html`
        <div class="columns two">
          ${[[session.model.id, asked.base], [asked.label, asked.trained]].map(([name, answer], index) => html`
            <div class="card column" key=${index}>
              <h4 class="choice">${index ? `Trained: ${name}` : `Base: ${name}`}</h4>
              <${Turns} turns=${[{ prompt: asked.prompt, answer }]} mode=${mode} name=${name} />
            </div>`)}
        </div>`}
    </section>`;
}
