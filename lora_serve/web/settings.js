// Settings of a request; what is left empty is the server's default.

import { NumberField } from "./number_field.js";
import { html } from "./ui.js";

const NUMBERS = [
  ["max_tokens", "Max tokens", { min: 1, step: 1 }],
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }],
  ["top_p", "Top p", { min: 0.05, max: 1, step: 0.05 }],
  ["top_k", "Top k", { min: -1, step: 1 }],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }],
  ["seed", "Seed", { step: 1 }],
  ["repetition_penalty", "Repetition penalty", { min: 0.01, max: 10, step: 0.05 }],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: 0.1 }],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1 }],
];

export const DEFAULTS = { max_tokens: 256, probabilities: true };

/** `settings` as they go into a request; `onChange` gets new ones. */
export function Settings({ mode, settings, onChange }) {
  const set = (name, value) => {
    const { [name]: _, ...others } = settings;
    onChange(value === "" || value === undefined ? others : { ...others, [name]: value });
  };
  return html`
    ${mode === "chat" && html`
      <label class="field">System prompt
        <textarea rows="3" value=${settings.system ?? ""}
          onInput=${(event) => set("system", event.target.value)}></textarea>
      </label>`}
    <div class="grid">
      ${NUMBERS.map(([name, label, limits]) => html`
        <label class="field">${label}
          <${NumberField} ...${limits} placeholder="default" value=${settings[name]}
            onChange=${(value) => set(name, value ?? undefined)} />
        </label>`)}
    </div>
    <label class="field">Stop at
      <input placeholder="a text that ends the answer" value=${settings.stop ?? ""} maxlength="256"
        onInput=${(event) => set("stop", event.target.value)} />
    </label>
    <label class="check">
      <input type="checkbox" checked=${settings.probabilities}
        onChange=${(event) => set("probabilities", event.target.checked || undefined)} />
      Token probabilities
    </label>
    ${settings.probabilities && html`
      <p class="hint">The more a token is shaded, the less likely it was. Point at it, or move to it with the arrow
        keys, to see what else could have come.</p>`}`;
}
