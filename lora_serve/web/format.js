// Numbers, sizes and times as people read them.

const tenths = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const count = (value) => tenths.format(value >= 100 ? Math.round(value) : value);

/** A number with its noun. */
export const counted = (value, noun, plural = `${noun}s`) => `${count(value)} ${value === 1 ? noun : plural}`;

/** Bytes, in powers of 1024. */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let index = 0;
  for (; value >= 1024 && index < units.length - 1; index++) value /= 1024;
  return `${value >= 100 || index === 0 ? Math.round(value) : value.toFixed(1)} ${units[index]}`;
}

/** Seconds, as ms, s or min. */
export function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 120 ? `${seconds.toFixed(seconds < 10 ? 2 : 1)} s` : `${Math.round(seconds / 60)} min`;
}

/** How long ago a time in seconds since the epoch was. */
export function ago(time) {
  const passed = Math.max(0, Date.now() / 1000 - time);
  if (passed < 60) return "just now";
  if (passed < 3600) return `${Math.round(passed / 60)} min ago`;
  if (passed < 86400) return `${Math.round(passed / 3600)} h ago`;
  return new Date(time * 1000).toLocaleDateString();
}

/** A share (0 to 1) in percent; a tiny one as less than it can show. */
export function percent(value) {
  if (value > 0 && value < 0.0005) return "<0.1\u00a0%";
  return `${tenths.format(100 * value)}\u00a0%`;
}

export const short = (digest) => digest.slice(0, 12);
