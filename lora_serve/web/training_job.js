// One training job: how far it is, its curves, and what may be done with it.

import { call } from "./api.js";
import { Confirm } from "./dialogs.js";
import { Download } from "./download.js";
import { ago, count, counted, duration, percent } from "./format.js";
import { Chart, stepAxis } from "./plot.js";
import { stepsOf, useEvents } from "./training_events.js";
import { PublishedResult } from "./training_result.js";
import { TryBesideBase } from "./training_try.js";
import { html, useEffect, useMemo, useState } from "./ui.js";

const ENDED = ["succeeded", "failed", "cancelled"];
const STATUS = { validating_files: "checking its files" };
const COLORS = { failed: "bad", running: "live", succeeded: "live" };
const MOST_EVENTS = 50; // that are shown

const loss = (value) => String(Number(value.toPrecision(3)));

/** The name of the adapter that a job makes. */
export const titleOf = (job) => job.adapter.split("@")[0];

export const Badge = ({ status }) =>
  html`<span class="badge ${COLORS[status] ?? ""}">${STATUS[status] ?? status}</span>`;

/** `heading`: a ref to what gets the focus. `onChanged`: the list of jobs is to be read again. */
export function TrainingJob({ job, session, heading, onTry, onChanged, onDeleted }) {
  const finished = ENDED.includes(job.status);
  const events = useEvents(job.id, finished);
  const steps = useMemo(() => stepsOf(events), [events]);
  const [asks, setAsks] = useState(null); // "cancel" or "delete", which are to be confirmed
  const [problem, setProblem] = useState(null);
  const path = `v1/fine_tuning/jobs/${job.id}`;
  const title = titleOf(job);

  useEffect(() => job.status === "succeeded" && void session.refresh(), [job.status]);

  const act = async (method, action, done) => {
    setProblem(null);
    try {
      await call(method, path + action);
      done();
    } catch (error) {
      setProblem(error.message);
    }
  };
  const change = (action) => act("POST", `/${action}`, onChanged);
  const remove = () => act("DELETE", "", onDeleted);

  return html`
    <section class="card stack" aria-labelledby="job-title">
      <div class="bar-row">
        <h2 id="job-title" tabindex="-1" ref=${heading}>${title}</h2>
        <span role="status"><${Badge} status=${job.status} /></span>
        <span class="spacer"></span>
        ${!finished && (job.status === "paused"
          ? html`<button type="button" onClick=${() => change("resume")}>Resume</button>`
          : html`<button type="button" onClick=${() => change("pause")}>Pause</button>`)}
        ${finished
          ? html`<button type="button" class="danger quiet" onClick=${() => setAsks("delete")}>Delete</button>`
          : html`<button type="button" class="danger quiet" onClick=${() => setAsks("cancel")}>Cancel job</button>`}
      </div>
      ${problem && html`<p class="error" role="alert">${problem}</p>`}
      ${job.error && html`<p class="error">${job.error.message}</p>`}
      ${(steps.length > 0 || !finished) && html`<${Progress} job=${job} steps=${steps} />`}
      ${!finished && events[0]?.type === "message" && html`<p class="hint">${events[0].message}</p>`}
      ${steps.length > 0 && html`<${Curves} steps=${steps} />`}
      ${job.status === "succeeded" && html`
        <${PublishedResult} job=${job} session=${session} onTry=${onTry} onProblem=${setProblem} />`}
      <${TryBesideBase} job=${job} session=${session} isRunning=${job.status === "running"}
        newest=${steps.at(-1)?.step} />
      <details>
        <summary>Settings and events</summary>
        <${JobFacts} job=${job} />
        ${job.result_files.map((file) => html`
          <p class="more" key=${file}>
            <${Download} path=${`v1/files/${file}/content`} file=${`${title}-steps.csv`} onProblem=${setProblem}
              text="Metrics of all steps (CSV)" />
          </p>`)}
        <ul class="events" aria-label="Events" tabindex="0">
          ${events.filter(({ type }) => type === "message").slice(0, MOST_EVENTS).map((event) => html`
            <li key=${event.id}><time class="hint">${new Date(event.created_at * 1000).toLocaleString()}</time>
              ${" "}<span class=${event.level === "info" ? "" : "warned"}>${event.message}</span></li>`)}
        </ul>
      </details>
    </section>
    ${asks === "cancel" && html`
      <${Confirm} title=${`Cancel ${title}?`} action="Cancel the job" onClose=${() => setAsks(null)}
        onConfirm=${() => change("cancel")} text="It ends at once and cannot go on. Its checkpoints stay." />`}
    ${asks === "delete" && html`
      <${Confirm} title=${`Delete the job ${title}?`} action="Delete" onConfirm=${remove} onClose=${() => setAsks(null)}
        text="Its curves, events and checkpoints are deleted. Adapters that it published stay." />`}`;
}

function Progress({ job, steps }) {
  const { step, total, tokens } = steps.at(-1) ?? { step: 0, total: job.training.steps, tokens: null };
  const epochs = job.hyperparameters.n_epochs;
  const epoch = total && Math.min(epochs, Math.floor((step / total) * epochs) + 1);
  const left = job.estimated_finish && Math.max(0, job.estimated_finish - Date.now() / 1000);
  const facts = [
    total && `step ${count(step)} of ${count(total)}`,
    epoch && `epoch ${epoch} of ${epochs}`,
    tokens !== null && counted(tokens, "token"),
    left && `about ${left < 60 ? `${Math.ceil(left)} s` : duration(left)} left`,
    job.finished_at && `took ${duration(job.finished_at - job.created_at)}, ended ${ago(job.finished_at)}`,
  ];
  return html`
    <div class="progress">
      <div class="meter" role="progressbar" aria-label="Steps" aria-valuemin="0" aria-valuemax=${total ?? 1}
        aria-valuenow=${step}><span style=${{ width: `${total ? (100 * step) / total : 0}%` }}></span></div>
      <p class="hint">${facts.filter(Boolean).join(" · ") || "It has not begun to train."}</p>
    </div>`;
}

function Curves({ steps }) {
  const axis = useMemo(() => stepAxis(steps[0].total), [steps[0].total]);
  const line = (title, name) => {
    const values = steps.map((each) => each[name]);
    return [title, values, values.findLast((value) => value !== null)];
  };
  const both = (training, validation) =>
    [line("training", training), line("validation", validation)].filter(([, , last]) => last !== undefined);
  const at = steps.map(({ step }) => step);
  const accuracy = both("accuracy", "validAccuracy");
  return html`
    <div class="charts">
      <${Chart} title="Loss" show=${loss} least=${0.01} axis=${axis} at=${at} lines=${both("loss", "validLoss")} />
      ${accuracy.length > 0 && html`
        <${Chart} title="Accuracy" show=${percent} least=${1} axis=${axis} at=${at} lines=${accuracy} />`}
    </div>`;
}

function JobFacts({ job }) {
  const { n_epochs, batch_size } = job.hyperparameters;
  const { training_data, validation_data, learning_rate } = job.training;
  const facts = [
    ["Job", html`<code>${job.id}</code>`],
    ["Base", job.model],
    ["Method", job.method.type],
    ["Examples", counted(training_data.examples, "example")],
    ["Validated with", validation_data && counted(validation_data.examples, "example")],
    ["Epochs", n_epochs],
    ["Batch size", batch_size],
    ["Learning rate", learning_rate],
    ["Adapter", job.peft.peft_type],
    ["Rank, alpha", job.lora && `${job.lora.r}, ${job.lora.lora_alpha}`],
    ["Virtual tokens", job.peft.num_virtual_tokens],
    ["Schedule", job.trainer.lr_scheduler_type],
    ["Seed", job.seed],
  ];
  return html`
    <dl class="facts">
      ${facts.filter(([, value]) => value != null).map(([name, value]) => html`
        <div><dt>${name}</dt><dd>${value}</dd></div>`)}
    </dl>`;
}
