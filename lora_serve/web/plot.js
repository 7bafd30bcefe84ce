// A chart of lines, over time or over the steps of a training job.

import { html, useEffect, useRef } from "./ui.js";

const HEIGHT = 170;
const FEW = 40; // values, each of which is a dot as well

const WHOLE = [...Array(8).keys()].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power)); // ticks of steps

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const lineColor = (index) => `--line-${index % 7}`;
const clock = (time) => new Date(time * 1000).toLocaleTimeString([], { timeStyle: "medium" });

/** Times in seconds since the epoch. */
export const clockAxis = { scale: {}, axis: { values: (_, ticks) => ticks.map(clock), space: 90 } };

/** Steps from the first to the last that is planned. */
export const stepAxis = (total) => ({
  scale: { time: false, range: () => [0, total] },
  axis: { incrs: WHOLE, space: 60 },
  dots: true,
});

/** A chart with the latest values beside the names of its lines, which is also how it is read without seeing it.
 *
 * `lines`: name, values at the places `at`, and the value that is told, unless it is the last one.
 */
export function Chart({ title, lines, show, at, axis, least }) {
  const place = useRef();
  const plot = useRef(null);
  const names = lines.map(([name]) => name).join("\n");
  const data = [at, ...lines.map(([, values]) => values)];

  useEffect(() => {
    plot.current = new uPlot(options(lines, show, least, axis, place.current.clientWidth), data, place.current);
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
        ${lines.map(([name, values, told = values.at(-1)], index) => html`
          <li><span class="swatch" style=${{ background: `var(${lineColor(index)})` }} aria-hidden="true"></span>
            ${name} <b>${told === null ? "–" : show(told)}</b></li>`)}
      </ul>
    </figure>`;
}

function options(lines, show, least, { scale, axis, dots }, width) {
  const grid = { stroke: () => color("--line"), width: 1 };
  const common = { stroke: () => color("--muted"), grid, ticks: { show: false } };
  const isDotted = ({ data }, index) => dots && data[index].filter((value) => value !== null).length < FEW;
  return {
    width, height: HEIGHT, legend: { show: false }, cursor: { drag: { setScale: false }, points: { size: 6 } },
    scales: {
      x: scale,
      y: { range: (_, low, high) => [0, Math.max(least, high * (least === 1 && high <= 1 ? 1 : 1.15))] },
    },
    axes: [
      { ...common, size: 30, ...axis },
      { ...common, size: 62, space: 34, values: (_, ticks) => ticks.map((tick) => show(tick)) },
    ],
    series: [{}, ...lines.map(([label], index) => ({
      label, stroke: () => color(lineColor(index)), width: 2, points: { show: isDotted, size: 5 }, spanGaps: true,
    }))],
  };
}
