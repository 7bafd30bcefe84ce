// The server's API: requests with the user's key, its errors as they are worded, streams and uploads.

export const ROOT = new URL(".", document.baseURI);
const STORED = "lora-serve-key";

let key = sessionStorage.getItem(STORED) ?? localStorage.getItem(STORED) ?? "";

export const hasKey = () => key !== "";
export const isRemembered = () => localStorage.getItem(STORED) !== null;

/** Use a key from now on: for this tab, or until it is forgotten. An empty one forgets it. */
export function setKey(value, remember) {
  key = value.trim();
  sessionStorage.removeItem(STORED);
  localStorage.removeItem(STORED);
  if (key) (remember ? localStorage : sessionStorage).setItem(STORED, key);
}

/** An error response; `status` 0 is a server that did not answer. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const noAnswer = () => new ApiError(0, "The server does not answer.");

const authorization = () => (key ? { Authorization: `Bearer ${key}` } : {});

async function send(method, path, body, signal, more) {
  const headers = { ...authorization(), ...more };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, ROOT), {
      method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body), credentials: "omit",
    });
  } catch (error) {
    throw error.name === "AbortError" ? error : noAnswer();
  }
  if (!response.ok) throw errorOf(response.status, await response.text());
  return response;
}

function errorOf(status, text) {
  try {
    return new ApiError(status, JSON.parse(text).error.message);
  } catch {
    return new ApiError(status, `The server answered ${status}.`);
  }
}

/** The JSON response to a request; `headers` are sent besides the key. Throws `ApiError`. */
export const call = async (method, path, body, headers) =>
  (await send(method, path, body, undefined, headers)).json();

/** The response as text. Throws `ApiError`. */
export const read = async (path) => (await send("GET", path)).text();

/** The response as a file. Throws `ApiError`. */
export const blob = async (path) => (await send("GET", path)).blob();

/** A response, whatever its status, for people who try the API out. */
export async function attempt(method, path, body) {
  const headers = authorization();
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(new URL(path, ROOT), { method, headers, body, credentials: "omit" });
  return { status: response.status, type: response.headers.get("Content-Type") ?? "", text: await response.text() };
}

/** The JSON events of a server-sent stream, until `[DONE]`. Throws `ApiError`, also for an error event. */
export async function* stream(path, body, signal) {
  const response = await send("POST", path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, "The stream broke off.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new ApiError(500, found.error.message);
      yield found;
    }
  }
}

/** Send a form, reporting the part that has left (0 to 1); `headers` besides the key. Throws `ApiError`. */
export function upload(method, path, form, onProgress, headers = {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not tell how far it is
    request.open(method, new URL(path, ROOT));
    if (key) request.setRequestHeader("Authorization", `Bearer ${key}`);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onerror = () => reject(noAnswer());
    request.onload = () =>
      request.status < 300
        ? resolve(JSON.parse(request.responseText))
        : reject(errorOf(request.status, request.responseText));
    request.send(form);
  });
}
