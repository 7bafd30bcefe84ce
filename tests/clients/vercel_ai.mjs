// Vercel's AI SDK with its default OpenAI provider, which speaks the Responses API, against a running server.
//
// By hand: `npm install ai @ai-sdk/openai zod` in a folder, this file copied into it, then
// `node vercel_ai.mjs http://127.0.0.1:8000 MODEL`. Prints a line per check; the exit status is 1 if any failed.

import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const question = "What is the weather in Paris?";
const common = {
  model: createOpenAI({ baseURL: `${url}/v1`, apiKey: "x" })(model),
  maxRetries: 0,
  temperature: 0,
  maxOutputTokens: 100,
};
const weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.string(), unit: z.enum(["celsius", "fahrenheit"]) }),
  execute: async ({ city }) => `It is sunny in ${city}.`,
});

async function parts(result) {
  const found = [];
  for await (const part of result.fullStream) {
    if (part.type === "error") throw part.error;
    found.push(part.type);
  }
  return found;
}

const checks = {
  async text() {
    const result = await generateText({ ...common, system: "Be brief.", prompt: question });
    assert(result.text && result.usage.outputTokens > 0);
  },
  async stream() {
    const found = await parts(streamText({ ...common, prompt: question }));
    assert(found.filter((type) => type === "text-delta").length > 1);
    assert.equal(found.at(-1), "finish");
  },
  async object() {
    const schema = z.object({ city: z.string(), country: z.string() });
    assert((await generateObject({ ...common, schema, prompt: question })).object.city);
  },
  async tools() {
    const result = await generateText({ ...common, prompt: question, tools: { weather }, toolChoice: "required" });
    assert(result.toolResults[0].output.startsWith("It is sunny in"));
  },
  async streamedTools() {
    const call = { type: "tool", toolName: "weather" };
    const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? call : "none" });
    const options = { tools: { weather }, stopWhen: stepCountIs(2), prepareStep };
    const found = await parts(streamText({ ...common, ...options, prompt: question }));
    for (const type of ["tool-input-delta", "tool-result", "text-delta"]) assert(found.includes(type), type);
  },
  async turns() {
    // Without `store: false` this library refers to earlier answers by id, and nothing is stored here.
    const options = { ...common, providerOptions: { openai: { store: false } } };
    const messages = [{ role: "user", content: question }];
    const first = await generateText({ ...options, messages });
    messages.push(...first.response.messages, { role: "user", content: "And in Rome?" });
    assert((await generateText({ ...options, messages })).text);
  },
  async logprobs() {
    const providerOptions = { openai: { logprobs: 2 } };
    const result = await generateText({ ...common, prompt: question, providerOptions });
    assert.equal(result.providerMetadata.openai.logprobs[0][0].top_logprobs.length, 2);
  },
  async tooLong() {
    const stream = streamText({ ...common, prompt: "word ".repeat(50_000), onError() {} });
    await assert.rejects(parts(stream), /maximum context length/);
  },
};

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(name.padEnd(22), "ok");
  } catch (error) {
    process.exitCode = 1;
    console.log(name.padEnd(22), "FAILED:", error.name, error.message.slice(0, 600));
  }
}
