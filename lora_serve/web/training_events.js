// Events of a training job, and the curves in them.

import { call } from "./api.js";
import { useRepeated } from "./session.js";
import { useEffect, useRef, useState } from "./ui.js";

const PAUSE = 1000; // ms between two looks
const PAGE = 1000; // events of a request
const MOST_PAGES = 20; // of an older job: its last 20,000 steps

/** The events of a job, newest first, kept fresh until it has finished. */
export function useEvents(id, finished) {
  const [events, setEvents] = useState([]);
  const known = useRef([]);
  const load = async () => {
    const newest = known.current[0]?.id;
    const found = [];
    try {
      for (let page = 0, after = ""; page < MOST_PAGES; page++) {
        const { data, has_more } = await call("GET", `v1/fine_tuning/jobs/${id}/events?limit=${PAGE}${after}`);
        const seen = data.findIndex((event) => event.id === newest);
        found.push(...(seen < 0 ? data : data.slice(0, seen)));
        if (seen >= 0 || !has_more) break;
        after = `&after=${data.at(-1).id}`;
      }
    } catch {
      return; // the list of jobs says what is wrong
    }
    const ids = new Set(known.current.map((event) => event.id)); // two looks may have overlapped
    const more = found.filter((event) => !ids.has(event.id));
    if (more.length) setEvents((known.current = [...more, ...known.current]));
  };
  useRepeated(load, PAUSE, !finished);
  useEffect(() => finished && void load(), [finished]);
  return events;
}

/** Metrics of the steps, in their order. Of preferences, the accuracy is that of their order. */
export function stepsOf(events) {
  const metrics = events.filter(({ type }) => type === "metrics").map(({ data }) => [data.step, data]);
  return [...new Map(metrics).values()].sort((a, b) => a.step - b.step).map((data) => ({
    step: data.step,
    total: data.total_steps,
    tokens: data.trained_tokens ?? null,
    loss: data.train_loss,
    accuracy: data.train_mean_token_accuracy ?? data.train_rewards_accuracy ?? null,
    validLoss: data.valid_loss ?? null,
    validAccuracy: data.valid_mean_token_accuracy ?? data.full_valid_rewards_accuracy ?? null,
  }));
}
