// The form of a new training job.

import { call } from "./api.js";
import { NumberField } from "./number_field.js";
import { ExamplesField } from "./training_data.js";
import { html, useState } from "./ui.js";

// Part of the request, field, label, limits, and what the server takes if it is left empty.
const NUMBERS = [
  ["hyperparameters", "n_epochs", "Epochs", { min: 1, max: 1000 }, "auto"],
  ["hyperparameters", "batch_size", "Batch size", { min: 1, max: 4096 }, "auto"],
  ["trainer", "learning_rate", "Learning rate", { min: 0, max: 10, step: "any" }, "auto"],
  ["lora", "r", "Rank", { min: 1, max: 1024 }, "16"],
];
const MORE_NUMBERS = [
  ["lora", "lora_alpha", "Alpha", { min: 0, step: "any" }, "32"],
  ["lora", "lora_dropout", "Dropout", { min: 0, max: 0.99, step: "any" }, "0"],
  ["trainer", "warmup_ratio", "Warm-up (share)", { min: 0, max: 1, step: "any" }, "0"],
  ["trainer", "weight_decay", "Weight decay", { min: 0, max: 10, step: "any" }, "0"],
  ["trainer", "max_grad_norm", "Max gradient norm", { min: 0, step: "any" }, "1"],
  ["job", "max_length", "Max tokens", { min: 2 }, "context"],
  ["job", "seed", "Seed", { min: 0 }, "random"],
];
const OF_DPO = ["hyperparameters", "beta", "Beta", { min: 0, max: 100, step: "any" }, "auto"];
const OF_VALIDATION = ["trainer", "early_stopping_patience", "Patience (epochs)", { min: 1, max: 1000 }, "no end"];
const DEFAULTS = { method: "supervised", training: "", validation: "", name: "" };

/** The body of the request. Numbers are by part and field in `values`. */
function bodyOf(model, { method, training, validation, name, adapter, modules, values = {} }) {
  const { hyperparameters = {}, trainer = {}, lora = {}, job = {} } = values;
  const { beta, ...common } = hyperparameters; // the other method has none
  const { early_stopping_patience, load_best_model_at_end, ...always } = trainer; // those need validation
  const listed = (modules ?? "").split(/[\s,]+/).filter(Boolean);
  return {
    model,
    training_file: training,
    ...(validation && { validation_file: validation }),
    ...(name && { suffix: name }),
    ...(adapter && { adapter }),
    method: { type: method, [method]: { hyperparameters: method === "dpo" ? hyperparameters : common } },
    lora: { ...lora, ...(listed.length && { target_modules: listed }) },
    trainer: validation ? trainer : always,
    ...job,
  };
}

export function NewJob({ session, files, onFiles, onBegun }) {
  const [settings, setSettings] = useState(DEFAULTS);
  const [problem, setProblem] = useState(null);
  const [busy, setBusy] = useState(false);
  const { method, training, validation, name, adapter, modules, values } = settings;
  const set = (field) => (value) => setSettings((before) => ({ ...before, [field]: value }));
  const setValue = (part, field, value) =>
    setSettings((before) => {
      const { [field]: _, ...others } = before.values?.[part] ?? {};
      const changed = value === null ? others : { ...others, [field]: value };
      return { ...before, values: { ...before.values, [part]: changed } };
    });
  const begin = async (event) => {
    event.preventDefault();
    setBusy(true);
    setProblem(null);
    try {
      onBegun(await call("POST", "v1/fine_tuning/jobs", bodyOf(session.model.id, settings)));
    } catch (error) {
      setProblem(error.message);
    }
    setBusy(false);
  };
  const number = ([part, field, label, limits, otherwise]) => html`
    <label class="field" key=${field}>${label}
      <${NumberField} step="1" ...${limits} placeholder=${otherwise} value=${values?.[part]?.[field]}
        onChange=${(value) => setValue(part, field, value)} />
    </label>`;
  const check = (part, field, label) => html`
    <label class="check">
      <input type="checkbox" checked=${values?.[part]?.[field] ?? false}
        onChange=${(event) => setValue(part, field, event.target.checked || null)} /> ${label}
    </label>`;
  const text = (field, value, label, placeholder, more) => html`
    <label class="field">${label}
      <input value=${value ?? ""} placeholder=${placeholder} maxlength="64" spellcheck=${false} autocomplete="off"
        ...${more} onInput=${(event) => set(field)(event.target.value)} />
    </label>`;

  return html`
    <form class="card stack" aria-labelledby="new-job-title" onSubmit=${begin}>
      <h2 id="new-job-title">New job</h2>
      <p class="hint">Trains an adapter on <code>${session.model.id}</code>, which answers meanwhile.</p>
      <div class="switch" role="group" aria-label="Method">
        ${[["supervised", "Supervised"], ["dpo", "Preferences (DPO)"]].map(([each, title]) => html`
          <button type="button" aria-pressed=${method === each} onClick=${() => set("method")(each)}>
            ${title}</button>`)}
      </div>
      <${ExamplesField} label="Examples" files=${files} value=${training} required onChange=${set("training")}
        onFiles=${onFiles} hint=${method === "dpo" ? "JSONL: pairs of replies" : "JSONL: chats or completions"} />
      <${ExamplesField} label="Validation examples" files=${files} value=${validation} onChange=${set("validation")}
        onFiles=${onFiles} hint="not learnt: they show when to stop" />
      ${text("name", name, "Name", "part of the adapter's name")}
      <div class="grid">${NUMBERS.map(number)}</div>
      <details>
        <summary>More settings</summary>
        <div class="stack">
          <div class="grid">
            ${method === "dpo" && number(OF_DPO)}
            ${MORE_NUMBERS.map(number)}
            ${validation && number(OF_VALIDATION)}
            <label class="field">Schedule
              <select value=${values?.trainer?.lr_scheduler_type ?? "linear"}
                onChange=${(event) => setValue("trainer", "lr_scheduler_type", event.target.value)}>
                ${["linear", "cosine", "constant"].map((each) => html`<option value=${each}>${each}</option>`)}
              </select>
            </label>
          </div>
          ${text("modules", modules, "Modules", "all linear ones", { maxlength: 2000 })}
          ${text("adapter", adapter, "A version of the adapter", "a new adapter", {
            pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*",
          })}
          ${check("lora", "use_rslora", "rsLoRA")}
          ${check("lora", "use_dora", "DoRA")}
          ${validation && check("trainer", "load_best_model_at_end", "The result is the best checkpoint")}
        </div>
      </details>
      ${problem && html`<p class="error" role="alert">${problem}</p>`}
      <div class="actions"><button class="primary" disabled=${busy}>Start training</button></div>
    </form>`;
}
