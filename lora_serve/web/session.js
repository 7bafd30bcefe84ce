// What the page knows of the server: whether it answers, what the user's key allows, its model, adapters and aliases.

import { ApiError, call, hasKey } from "./api.js";
import { useEffect, useState } from "./ui.js";

const RETRY = 2000; // ms between attempts while the server starts
const REFRESH = 4000; // ms between two looks at the lists

/** The adapters and aliases that the key may use. */
async function published() {
  const [adapters, aliases] = await Promise.all(["v1/adapters", "v1/aliases"].map((path) => call("GET", path)));
  return { adapters: adapters.data, aliases: aliases.data };
}

/** Connect, and keep the lists of adapters and aliases fresh while the page is seen.
 *
 * `state` is "connecting", "key" (one is needed), "down", or "ready"; `problem` says what is wrong, with the key or
 * with the server.
 */
export function useSession() {
  const [session, setSession] = useState({ state: "connecting", adapters: [], aliases: [] });

  async function connect() {
    try {
      const [permissions, models, tokenizer] = await Promise.all(
        ["v1/key", "v1/models", "tokenizer_info"].map((path) => call("GET", path)),
      );
      setSession({
        state: "ready", permissions, model: models.data[0], hasTemplate: tokenizer.chat_template !== null,
        ...(await published()),
      });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      const needsKey = error.status === 401;
      const problem = needsKey && !hasKey() ? null : error.message;
      setSession({ state: needsKey ? "key" : "down", problem, adapters: [], aliases: [] });
      if (!needsKey) setTimeout(connect, RETRY);
    }
  }

  async function refresh() {
    try {
      const found = await published();
      setSession((before) => (before.state === "ready" ? { ...before, ...found, problem: null } : before));
    } catch (error) {
      if (error.status === 401) connect();
      else setSession((before) => ({ ...before, problem: error.message })); // what is on the page stays
    }
  }

  useEffect(() => void connect(), []);
  useRepeated(refresh, REFRESH, session.state === "ready");
  return { ...session, connect, refresh };
}

/** Call a function again and again while it is wanted and the page is seen; more rarely where it takes long. */
export function useRepeated(action, pause, wanted) {
  useEffect(() => {
    if (!wanted) return undefined;
    let timer;
    let ended = false;
    const again = async () => {
      const begun = performance.now();
      if (!document.hidden) await action();
      if (!ended) timer = setTimeout(again, Math.max(pause, 10 * (performance.now() - begun)));
    };
    again();
    return () => {
      ended = true;
      clearTimeout(timer);
    };
  }, [wanted]);
}
