// JSON schemas as people read them: types in words, fields in a tree, and an example.

import { html } from "./ui.js";

const DEEPEST = 4; // levels of fields
const COMPONENT = "#/components/schemas/";

/** A schema with its reference followed; `name` is that of the component. */
function resolved(schema, root) {
  if (!schema.$ref) return { schema, name: schema.title };
  const name = schema.$ref.slice(COMPONENT.length);
  return { schema: root.components.schemas[name], name };
}

const alternatives = (schema) => schema.anyOf ?? schema.oneOf;

/** The type in words. */
export function typeOf(given, root) {
  const { schema, name } = resolved(given, root);
  const either = alternatives(schema);
  if (either) return [...new Set(either.map((each) => typeOf(each, root)))].join(" or ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {}, root)}`;
  if (schema.type === "object" && given.$ref) return name;
  return [schema.type ?? "anything"].flat().join(" or ");
}

function limits(schema) {
  const found = [
    ["minimum", "at least "], ["exclusiveMinimum", "more than "], ["maximum", "at most "],
    ["maxLength", "characters at most "], ["maxItems", "items at most "], ["pattern", "matches "],
  ];
  const direct = alternatives(schema)?.find((each) => each.type && each.type !== "null") ?? schema;
  return found.filter(([key]) => key in direct).map(([key, words]) => words + direct[key]).join(", ");
}

/** The fields of a schema, nested. `marked`: say which are required. */
export function Fields({ schema: given, root, marked = false, depth = 0 }) {
  const objects = objectsIn(given, root);
  if (!objects.length || depth >= DEEPEST) return null;
  return objects.map(({ schema, name }) => html`
    <div class="object">
      ${objects.length > 1 && name && html`<p class="hint">${name}</p>`}
      ${depth > 0 && schema.description && html`<p class="hint">${prose(schema.description)}</p>`}
      <ul class="fields">
        ${Object.entries(schema.properties).map(([field, each]) => html`
          <li>
            <code>${field}</code> <span class="type">${typeOf(each, root)}</span>${" "}
            ${marked && schema.required?.includes(field) && html`<span class="badge">required</span>`}
            ${limits(each) && html`<span class="hint"> ${limits(each)}</span>`}
            ${each.description && html`<p class="hint">${prose(each.description)}</p>`}
            ${objectsIn(each, root).length > 0 && depth + 1 < DEEPEST && html`
              <${Nested} schema=${each} root=${root} marked=${marked} depth=${depth + 1} />`}
          </li>`)}
      </ul>
    </div>`);
}

const Nested = (given) => html`<details><summary>fields</summary><${Fields} ...${given} /></details>`;

/** The objects with fields that a schema is, or is a list or an alternative of. */
function objectsIn(given, root) {
  const { schema, name } = resolved(given, root);
  if (schema.properties) return [{ schema, name }];
  if (schema.items) return objectsIn(schema.items, root);
  return (alternatives(schema) ?? []).flatMap((each) => objectsIn(each, root));
}

/** A description, with what stands between backticks as code. */
export const prose = (text) =>
  text.split("`").map((part, index) => (index % 2 ? html`<code>${part}</code>` : part));

/** A value that a schema allows: its required fields, as simple as they may be. */
export function example(given, root) {
  const { schema } = resolved(given, root);
  const either = alternatives(schema);
  if (either) return example(either[0], root);
  if ("const" in schema) return schema.const;
  if (schema.enum) return schema.enum[0];
  if (schema.properties) {
    return Object.fromEntries((schema.required ?? []).map((field) => [field, example(schema.properties[field], root)]));
  }
  if (schema.type === "array") return [example(schema.items ?? {}, root)];
  const number = schema.minimum ?? 1;
  return { string: "hello", integer: number, number, boolean: true, object: {} }[schema.type] ?? null;
}
