// One request to the model and its answer, as it streams in.

import { ApiError, stream } from "./api.js";

/** The request of a column: its path and body. `turns`: earlier ones of the conversation. */
export function requestOf(mode, prompt, turns, choice, settings) {
  const { system, probabilities, ...sampling } = settings;
  const body = { ...sampling, stream: true, stream_options: { include_usage: true } };
  const adapter = adapterOf(choice);
  if (adapter !== null) body.adapter = adapter;
  if (mode === "completion") {
    if (probabilities) body.logprobs = 5;
    return { path: "v1/completions", body: { prompt, ...body } };
  }
  const messages = [
    ...(system ? [{ role: "system", content: system }] : []),
    ...turns.filter((turn) => !turn.answer.error).flatMap((turn) => [
      { role: "user", content: turn.prompt },
      { role: "assistant", content: turn.answer.text },
    ]),
    { role: "user", content: prompt },
  ];
  if (probabilities) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  return { path: "v1/chat/completions", body: { messages, ...body } };
}

/** Chosen adapters as the API takes them: null is the base, a name, or names with weights. */
function adapterOf(choice) {
  if (!choice.length) return null;
  if (choice.length === 1 && choice[0].weight === 1) return choice[0].name;
  return choice.map(({ name, weight }) => ({ name, weight }));
}

export const newAnswer = () => ({
  text: "", reasoning: "", tokens: [], running: true, error: null, finish: null, first: null, seconds: null,
  generated: null, served: null,
});

/** Stream an answer into `answer`, calling `changed` after each event. Never throws. */
export async function generate({ path, body }, answer, signal, changed) {
  const begun = performance.now();
  const passed = () => (performance.now() - begun) / 1000;
  const bytes = new TextDecoder();
  try {
    for await (const chunk of stream(path, body, signal)) {
      const [choice] = chunk.choices;
      answer.served = chunk.adapter ? [chunk.adapter].flat().join(" + ") : chunk.model;
      if (chunk.usage) answer.generated = chunk.usage.completion_tokens;
      if (!choice) continue;
      answer.first ??= passed();
      answer.text += choice.text ?? choice.delta.content ?? "";
      answer.reasoning += choice.delta?.reasoning_content ?? "";
      answer.tokens.push(...(choice.delta ? chatTokens(choice.logprobs, bytes) : completionTokens(choice.logprobs)));
      answer.finish = choice.finish_reason ?? answer.finish;
      answer.seconds = passed();
      changed();
    }
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else if (error instanceof ApiError) answer.error = error.message;
    else answer.error = `This page failed: ${error.message}`;
  }
  answer.running = false;
  changed();
}

/** Tokens of a chat chunk. A character that several tokens make up is the last one's text. */
function chatTokens(logprobs, decoder) {
  return (logprobs?.content ?? []).map((entry) => ({
    text: entry.bytes ? decoder.decode(new Uint8Array(entry.bytes), { stream: true }) : entry.token,
    probability: Math.exp(entry.logprob),
    likely: entry.top_logprobs.map((other) => ({ text: other.token, probability: Math.exp(other.logprob) })),
  }));
}

function completionTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((text, index) => ({
    text,
    probability: Math.exp(logprobs.token_logprobs[index]),
    likely: Object.entries(logprobs.top_logprobs[index] ?? {})
      .map(([other, value]) => ({ text: other, probability: Math.exp(value) }))
      .sort((a, b) => b.probability - a.probability),
  }));
}

/** Generated tokens per second after the first one; null if there were too few. */
export function pace(answer) {
  const generated = answer.generated ?? answer.tokens.length;
  const passed = answer.seconds - answer.first;
  return generated > 1 && passed > 0 ? (generated - 1) / passed : null;
}

/** A request as a command for a shell; the key is a variable of it. */
export function asCurl({ path, body }, root, keyed) {
  const quoted = `'${JSON.stringify(body, null, 2).replaceAll("'", `'\\''`)}'`;
  const key = keyed ? `  -H "Authorization: Bearer $LORA_SERVE_KEY" \\\n` : "";
  return `curl -N ${new URL(path, root)} \\\n  -H 'Content-Type: application/json' \\\n${key}  -d ${quoted}`;
}
