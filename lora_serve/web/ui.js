// Preact, its hooks, and `html`: templates instead of JSX.

import { h } from "./vendor/preact.mjs";
import htm from "./vendor/htm.mjs";

export { render } from "./vendor/preact.mjs";
export { useEffect, useMemo, useReducer, useRef, useState } from "./vendor/hooks.mjs";

export const html = htm.bind(h);

/** Class names of those that hold. */
export const classes = (...names) => names.filter(Boolean).join(" ");

let lastId = 0;

/** A new id, to tie a label to its field. */
export const newId = (prefix) => `${prefix}-${++lastId}`;
