// Targets of aliases: NAME, which is always its newest version, or NAME@DIGEST.

import { short } from "./format.js";

export const targetOf = (name, digest) => `${name}@${digest}`;

/** A target as people read it. */
export function shortTarget(target) {
  const [name, digest] = target.split("@");
  return digest ? targetOf(name, short(digest)) : name;
}

/** An alias's targets once a version replaces those of the same adapter, with their weight. */
export function pointedAt(targets, name, digest) {
  const others = targets.filter((target) => target.adapter.split("@")[0] !== name);
  const replaced = targets.filter((target) => target.adapter.split("@")[0] === name);
  const weight = replaced.reduce((sum, target) => sum + target.weight, 0) || 1;
  return [{ adapter: targetOf(name, digest), weight }, ...others];
}
