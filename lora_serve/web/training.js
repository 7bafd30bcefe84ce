// Training: new jobs, the list of jobs, and one of them.

import { call } from "./api.js";
import { ago, counted } from "./format.js";
import { useRepeated } from "./session.js";
import { Badge, TrainingJob, titleOf } from "./training_job.js";
import { NewJob } from "./training_form.js";
import { html, useEffect, useRef, useState } from "./ui.js";

const PAUSE = 1500; // ms between two looks at the jobs
const MOST_JOBS = 100; // that are listed
const MOST_FILES = 200;
const JOBS = "v1/fine_tuning/jobs";

export function TrainingView({ session, onTry }) {
  const [jobs, setJobs] = useState(null); // newest first; null: not known yet
  const [files, setFiles] = useState([]);
  const [problem, setProblem] = useState(null); // an ApiError
  const [chosen, setChosen] = useState(null); // id of a job; null is the newest one
  const [said, setSaid] = useState("");
  const heading = useRef();
  const { admin } = session.permissions;
  const isOff = problem?.status === 400; // it says so, and how to turn it on
  const job = jobs?.find(({ id }) => id === chosen) ?? jobs?.[0];

  const load = async () => {
    try {
      setJobs((await call("GET", `${JOBS}?limit=${MOST_JOBS}`)).data);
      setProblem(null);
    } catch (error) {
      setProblem(error);
    }
  };
  const loadFiles = async () => {
    try {
      setFiles((await call("GET", `v1/files?purpose=fine-tune&limit=${MOST_FILES}`)).data);
    } catch (error) {
      setProblem(error);
    }
  };
  useRepeated(load, PAUSE, admin && !isOff);
  useEffect(() => jobs && void loadFiles(), [jobs === null]);

  if (!admin) {
    return html`
      <h1>Training</h1>
      <p class="notice">Training needs an admin key, as everything does that publishes adapters.</p>`;
  }
  if (isOff || !jobs) {
    return html`<h1>Training</h1><p class="notice" role="status">${problem?.message ?? "Asking…"}</p>`;
  }

  const choose = (id) => {
    setChosen(id);
    setTimeout(() => heading.current?.focus());
  };
  const begun = (made) => {
    setSaid(`${titleOf(made)} has begun.`);
    setJobs([made, ...jobs]);
    choose(made.id);
  };
  const deleted = () => {
    setSaid(`${titleOf(job)} is deleted.`);
    setChosen(null);
    load();
  };
  return html`
    <h1>Training</h1>
    ${problem && html`<p class="error" role="alert">${problem.message}</p>`}
    <div class="training">
      <${NewJob} session=${session} files=${files} onFiles=${loadFiles} onBegun=${begun} />
      <div class="stack">
        <section class="card" aria-labelledby="jobs-title">
          <h2 id="jobs-title">${counted(jobs.length, "job")}</h2>
          <p class="hint" role="status">${said}</p>
          ${!jobs.length && html`<p class="empty">What is trained is listed here, with its curves.</p>`}
          <ul class="jobs">
            ${jobs.map((each) => html`
              <li key=${each.id}>
                <button type="button" aria-current=${each === job ? "true" : undefined}
                  onClick=${() => choose(each.id)}>
                  <span class="name">${titleOf(each)}</span> <${Badge} status=${each.status} />
                  ${" "}<span class="hint">${ago(each.created_at)}</span>
                </button>
              </li>`)}
          </ul>
          ${jobs.length === MOST_JOBS && html`<p class="hint">These are the newest ones.</p>`}
        </section>
        ${job && html`
          <${TrainingJob} key=${job.id} job=${job} session=${session} heading=${heading} onTry=${onTry}
            onChanged=${load} onDeleted=${deleted} />`}
      </div>
    </div>`;
}
