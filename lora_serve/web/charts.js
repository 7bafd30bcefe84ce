// Live charts, from the metrics since the page was opened.

import { count, duration, percent } from "./format.js";
import { Chart, clockAxis } from "./plot.js";
import { mean, quantile, rate } from "./series.js";
import { html } from "./ui.js";

const MOST_ADAPTERS = 6; // with a line of their own
const WINDOW = 5; // samples that a quantile or a mean is over
const TTFT = "lora_serve_time_to_first_token_seconds";
const ITL = "lora_serve_inter_token_seconds";
const TOKENS = "lora_serve_adapter_tokens_total";

const perSecond = (value) => `${count(value)}/s`;

/** What each chart shows: for every sample after the first, one value per line. */
function charts(samples) {
  const pairs = samples.slice(1).map((after, index) => [samples[index], after]);
  const windows = samples.slice(1).map((after, index) => [samples[Math.max(0, index + 1 - WINDOW)], after]);
  const now = (name) => pairs.map(([, after]) => after.value(name));
  const over = (find) => windows.map(([before, after]) => find(before, after));
  return [
    { title: "Tokens per second, by adapter", show: perSecond, least: 10, lines: tokensByAdapter(pairs) },
    { title: "Time to first token", show: duration, least: 0.01, lines: [
      ["median", over((before, after) => quantile(before, after, TTFT, 0.5))],
      ["95th percentile", over((before, after) => quantile(before, after, TTFT, 0.95))],
    ] },
    { title: "Between two tokens", show: duration, least: 0.01, lines: [
      ["median", over((before, after) => quantile(before, after, ITL, 0.5))],
      ["95th percentile", over((before, after) => quantile(before, after, ITL, 0.95))],
    ] },
    { title: "A batch, on average", show: count, least: 1, lines: [
      ["sequences", over((before, after) => mean(before, after, "lora_serve_batch_sequences"))],
      ["adapters", over((before, after) => mean(before, after, "lora_serve_batch_adapters"))],
      ["tokens", over((before, after) => mean(before, after, "lora_serve_batch_tokens"))],
    ] },
    { title: "KV cache in use", show: percent, least: 1, lines: [["used", now("lora_serve_kv_usage_ratio")]] },
    { title: "Sequences", show: count, least: 1, lines: [
      ["running", now("lora_serve_sequences_running")],
      ["waiting", now("lora_serve_sequences_waiting")],
    ] },
  ];
}

/** A line for each of the adapters with the most tokens, and one for the others. */
function tokensByAdapter(pairs) {
  const last = pairs.at(-1)[1];
  const grown = (name) => last.value(TOKENS, { adapter: name }) - pairs[0][0].value(TOKENS, { adapter: name });
  const names = last.labels(TOKENS, "adapter").sort((a, b) => grown(b) - grown(a) || a.localeCompare(b));
  const line = (name) => pairs.map(([before, after]) => rate(before, after, TOKENS, { adapter: name }));
  const lines = names.slice(0, MOST_ADAPTERS).map((name) => [name, line(name)]);
  if (names.length > MOST_ADAPTERS) {
    const others = names.slice(MOST_ADAPTERS).map(line);
    lines.push([`${others.length} others`, pairs.map((_, at) => others.reduce((sum, values) => sum + values[at], 0))]);
  }
  return lines.length ? lines : [["no tokens yet", pairs.map(() => 0)]];
}

export function ChartsView({ session, metrics }) {
  if (!session.permissions.metrics) {
    return html`
      <h1>Charts</h1>
      <p class="notice">Charts are drawn from the server's metrics, which tell of all adapters. They need a key with
        ${" "}<code>metrics: true</code>, or an admin key of all adapters.</p>`;
  }
  const { samples, problem } = metrics;
  return html`
    <h1>Charts</h1>
    ${problem && html`<p class="error" role="alert">${problem}</p>`}
    ${samples.length < 2
      ? html`<p class="notice" role="status">Measuring…</p>`
      : html`<div class="charts">
          ${charts(samples).map((chart) => html`
            <${Chart} key=${chart.title} ...${chart} axis=${clockAxis}
              at=${samples.slice(1).map((sample) => sample.time)} />`)}
        </div>`}`;
}
