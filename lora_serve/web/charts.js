// Live charts, from the metrics since the page was opened.

import { count, duration, percent } from "./format.js";
import { mean, quantile, rate } from "./series.js";
import { html, useEffect, useRef } from "./ui.js";

const MOST_ADAPTERS = 6; // with a line of their own
const WINDOW = 5; // samples that a quantile or a mean is over
const HEIGHT = 170;
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
            <${Chart} key=${chart.title} ...${chart} times=${samples.slice(1).map((sample) => sample.time)} />`)}
        </div>`}`;
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const lineColor = (index) => `--line-${index % 7}`;

/** A chart with the latest values beside the names of its lines, which is also how it is read without seeing it. */
function Chart({ title, lines, show, times, least }) {
  const place = useRef();
  const plot = useRef(null);
  const names = lines.map(([name]) => name).join("\n");
  const data = [times, ...lines.map(([, values]) => values)];

  useEffect(() => {
    plot.current = new uPlot(options(lines, show, least, place.current.clientWidth), data, place.current);
    const resized = new ResizeObserver(([{ contentRect }]) =>
      plot.current.setSize({ width: contentRect.width, height: HEIGHT }));
    resized.observe(place.current);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const redraw = () => plot.current.redraw(false);
    scheme.addEventListener("change", redraw);
    return () => {
      scheme.removeEventListener("change", redraw);
      resized.disconnect();
      plot.current.destroy();
    };
  }, [names]);
  useEffect(() => plot.current.setData(data));

  return html`
    <figure class="card chart">
      <figcaption>${title}</figcaption>
      <div ref=${place} class="plot" aria-hidden="true"></div>
      <ul class="legend">
        ${lines.map(([name, values], index) => html`
          <li><span class="swatch" style=${{ background: `var(${lineColor(index)})` }} aria-hidden="true"></span>
            ${name} <b>${values.at(-1) === null ? "–" : show(values.at(-1))}</b></li>`)}
      </ul>
    </figure>`;
}

function options(lines, show, least, width) {
  const grid = { stroke: () => color("--line"), width: 1 };
  const axis = { stroke: () => color("--muted"), grid, ticks: { show: false } };
  return {
    width, height: HEIGHT, legend: { show: false }, cursor: { drag: { setScale: false }, points: { size: 6 } },
    scales: { y: { range: (_, low, high) => [0, Math.max(least, high * (least === 1 && high <= 1 ? 1 : 1.15))] } },
    axes: [
      { ...axis, values: (_, ticks) => ticks.map((tick) => clock(tick)), space: 90, size: 30 },
      { ...axis, size: 62, space: 34, values: (_, ticks) => ticks.map((tick) => show(tick)) },
    ],
    series: [{}, ...lines.map(([label], index) => ({
      label, stroke: () => color(lineColor(index)), width: 2, points: { show: false }, spanGaps: true,
    }))],
  };
}

const clock = (time) => new Date(time * 1000).toLocaleTimeString([], { timeStyle: "medium" });
