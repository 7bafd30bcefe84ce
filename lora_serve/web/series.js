// Metrics over time: what `/metrics` says, sample by sample, and the rates and quantiles between samples.

import { read } from "./api.js";
import { useRepeated } from "./session.js";
import { useRef, useState } from "./ui.js";

const PAUSE = 2000; // ms between samples
const KEPT = 150; // samples: five minutes

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** One reading of the metrics. */
export class Sample {
  constructor(text, time) {
    this.time = time;
    this.series = new Map(); // name → [{labels, value}]
    for (const line of text.split("\n")) {
      const found = LINE.exec(line);
      if (!found) continue;
      const labels = Object.fromEntries([...(found[2] ?? "").matchAll(LABEL)].map(([, name, value]) => [name, value]));
      if (!this.series.has(found[1])) this.series.set(found[1], []);
      this.series.get(found[1]).push({ labels, value: Number(found[3]) });
    }
  }

  /** Sum of a metric over the label sets that have these labels. */
  value(name, labels = {}) {
    const fits = (each) => Object.entries(labels).every(([label, value]) => each.labels[label] === value);
    return (this.series.get(name) ?? []).filter(fits).reduce((sum, each) => sum + each.value, 0);
  }

  /** All values of a label of a metric. */
  labels(name, label) {
    return [...new Set((this.series.get(name) ?? []).map((each) => each.labels[label]))];
  }
}

/** How much a counter grew per second between two samples. */
export const rate = (before, after, name, labels) =>
  Math.max(0, after.value(name, labels) - before.value(name, labels)) / (after.time - before.time);

/** Mean of a histogram's observations between two samples; null without any. */
export function mean(before, after, name) {
  const grown = (part) => after.value(`${name}_${part}`) - before.value(`${name}_${part}`);
  return grown("count") > 0 ? grown("sum") / grown("count") : null;
}

/** A quantile of a histogram's observations between two samples, linear within a bucket; null without any. */
export function quantile(before, after, name, part) {
  const bounds = after.labels(`${name}_bucket`, "le"); // in order; the last is +Inf
  const counts = bounds.map((le) => after.value(`${name}_bucket`, { le }) - before.value(`${name}_bucket`, { le }));
  const wanted = part * (counts.at(-1) ?? 0);
  if (!(wanted > 0)) return null;
  const index = counts.findIndex((count) => count >= wanted);
  const lower = index ? Number(bounds[index - 1]) : 0;
  if (bounds[index] === "+Inf") return lower;
  const below = index ? counts[index - 1] : 0;
  return lower + ((Number(bounds[index]) - lower) * (wanted - below)) / (counts[index] - below);
}

/** Samples of the last minutes, read again and again while they may be. `problem`: why there are none. */
export function useMetrics(allowed) {
  const samples = useRef([]);
  const [state, setState] = useState({ latest: null, problem: null });
  const sample = async () => {
    try {
      samples.current = [...samples.current, new Sample(await read("metrics"), Date.now() / 1000)].slice(-KEPT);
      setState({ latest: samples.current.at(-1), problem: null });
    } catch (error) {
      setState((before) => ({ ...before, problem: error.message }));
    }
  };
  useRepeated(sample, PAUSE, allowed);
  return { ...(allowed ? state : { latest: null, problem: null }), samples: samples.current };
}
