// A text as its tokens, coloured by probability; the token under the pointer or with the focus shows its alternatives.

import { percent } from "./format.js";
import { classes, html, useRef, useState } from "./ui.js";

/** The tokens of an answer. Those after its text (an end token) are marked as such. Arrow keys move between tokens. */
export function Tokens({ answer }) {
  const [shown, setShown] = useState(null); // {index, left, top, above}
  const [active, setActive] = useState(0); // the one that Tab reaches
  const list = useRef();
  const { tokens } = answer;

  const show = (event) => {
    const element = event.target.closest("[data-index]");
    if (!element) return setShown(null);
    const box = element.getBoundingClientRect();
    const above = box.bottom + 230 > innerHeight;
    return setShown({
      index: Number(element.dataset.index),
      left: Math.max(8, Math.min(box.left, innerWidth - 268)),
      ...(above ? { bottom: innerHeight - box.top + 6 } : { top: box.bottom + 6 }),
    });
  };
  const move = (event) => {
    const last = tokens.length - 1;
    const to = { ArrowRight: active + 1, ArrowLeft: active - 1, ArrowDown: active + 1, ArrowUp: active - 1,
      Home: 0, End: last }[event.key];
    if (event.key === "Escape") setShown(null);
    if (to === undefined) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(last, to));
    setActive(next);
    list.current.querySelector(`[data-index="${next}"]`).focus();
  };

  let left = answer.text.length;
  return html`
    <div class="tokens" ref=${list} role="listbox" aria-label="Tokens and their probabilities"
      aria-orientation="horizontal" onPointerOver=${show} onPointerLeave=${() => setShown(null)} onKeyDown=${move}
      onFocusIn=${show} onFocusOut=${() => setShown(null)}>
      ${tokens.map((token, index) => {
        const outside = left <= 0 && token.text !== "";
        left -= token.text.length;
        return html`<span key=${index} role="option" data-index=${index} tabindex=${index === active ? 0 : -1}
          aria-selected=${shown?.index === index} aria-label=${spoken(token)}
          onFocus=${() => setActive(index)} style=${{ "--doubt": (1 - token.probability).toFixed(3) }}
          class=${classes("token", outside && "outside")}>${token.text}</span>`;
      })}
    </div>
    ${shown && tokens[shown.index] && html`<${Alternatives} token=${tokens[shown.index]} place=${shown} />`}`;
}

function Alternatives({ token, place }) {
  const pixels = (value) => (value === undefined ? undefined : `${value}px`);
  const style = { left: pixels(place.left), top: pixels(place.top), bottom: pixels(place.bottom) };
  return html`
    <div class="alternatives" role="tooltip" style=${style}>
      <p><code>${visible(token.text)}</code> <strong>${percent(token.probability)}</strong></p>
      <ul>
        ${token.likely.map((other) => html`
          <li class=${classes(other.probability === token.probability && "chosen")}>
            <code>${visible(other.text)}</code>
            <span class="bar"><span style=${{ width: `${100 * other.probability}%` }}></span></span>
            <span class="value">${percent(other.probability)}</span>
          </li>`)}
      </ul>
    </div>`;
}

/** A token with its spaces and line ends made visible. */
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "·";

function spoken(token) {
  const others = token.likely.filter((other) => other.text !== token.text).slice(0, 3);
  const listed = others.map((other) => `${visible(other.text)} ${percent(other.probability)}`).join(", ");
  return `${visible(token.text)}, ${percent(token.probability)}${listed ? `; others: ${listed}` : ""}`;
}
