// The files of an adapter among those that were dropped or picked.

// What the server opens; the rest of a trainer's folder is not sent.
const WANTED = ["adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json", "modules.json",
  "1_Pooling/config.json", "serve.yaml"];
const ARCHIVE = /\.(zip|tar|tgz|tar\.gz)$/i;
const DEEPEST = 4;

/** Picked files as {path, file}. */
export const picked = (files) => [...files].map((file) => ({ path: file.webkitRelativePath || file.name, file }));

/** Dropped files and folders as {path, file}. */
export async function dropped(items) {
  const files = [...items].filter((item) => item.kind === "file");
  const entries = files.map((item) => item.webkitGetAsEntry() ?? item.getAsFile()); // now: a drop's items do not last
  const found = entries.map((entry) => (entry instanceof File ? picked([entry]) : walk(entry, 0)));
  return (await Promise.all(found)).flat();
}

async function walk(entry, depth) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ path: entry.fullPath.replace(/^\//, ""), file }];
  }
  if (depth >= DEEPEST) return [];
  const reader = entry.createReader();
  const children = [];
  for (;;) { // it returns a hundred at a time
    const more = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!more.length) break;
    children.push(...more);
  }
  return (await Promise.all(children.map((child) => walk(child, depth + 1)))).flat();
}

/** The form parts of one adapter, and a name for it. Throws an Error that says what is missing. */
export function chooseAdapter(found) {
  const archives = found.filter(({ path }) => ARCHIVE.test(path));
  if (archives.length === 1 && found.length === 1) {
    const { path, file } = archives[0];
    return { parts: [["archive", file, file.name]], name: nameFrom(path.replace(ARCHIVE, "")), size: file.size };
  }
  const folders = found
    .filter(({ path }) => path.split("/").at(-1) === WANTED[0])
    .map(({ path }) => path.slice(0, -WANTED[0].length))
    .sort((a, b) => a.length - b.length);
  if (!folders.length) throw new Error("There is no adapter_config.json among these files, nor are they one archive.");
  const [folder, ...others] = folders; // the outermost: checkpoints of a trainer lie further inside
  if (others.some((other) => !other.startsWith(folder))) {
    throw new Error(`There are ${folders.length} adapters: choose the folder of one.`);
  }
  const own = found.filter(({ path }) => path.startsWith(folder) && WANTED.includes(path.slice(folder.length)));
  return {
    parts: own.map(({ path, file }) => ["files", file, path.slice(folder.length)]),
    name: nameFrom(folder.replace(/\/$/, "")),
    size: own.reduce((sum, { file }) => sum + file.size, 0),
  };
}

/** A valid adapter name, from a folder's or an archive's. */
const nameFrom = (path) =>
  path.split("/").at(-1).replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 64);

/** The form that uploads it; inspecting takes no name. `trust`: its settings are to count. */
export function formOf({ parts }, trust, name) {
  const form = new FormData();
  if (name) form.append("name", name);
  if (trust) form.append("trust_settings", "true");
  for (const part of parts) form.append(...part);
  return form;
}
