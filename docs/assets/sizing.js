// Sizes of adapters and of the KV cache, and how many fit. tests/test_demo.py compares these formulas with the server.

// Bytes of one adapter in memory: A [rank, in] and B [rank, out] of every adapted module, each at a multiple of 64 bytes.
function adapterBytes(shapes, rank, elementBytes) {
  const aligned = (elements) => Math.ceil((elements * elementBytes) / 64) * 64;
  return shapes.reduce((sum, [inputs, outputs]) => sum + aligned(rank * inputs) + aligned(rank * outputs), 0);
}

// [in, out] of the linear modules of a Llama-shaped decoder: "attention" (q, k, v, o), "mlp" (gate, up, down) or "all".
function moduleShapes(config, which) {
  const hidden = config.hidden_size;
  const heads = config.num_attention_heads;
  const headDim = config.head_dim || hidden / heads;
  const queries = heads * headDim;
  const keys = (config.num_key_value_heads || heads) * headDim;
  const attention = [[hidden, queries], [hidden, keys], [hidden, keys], [queries, hidden]];
  const mlp = [[hidden, config.intermediate_size], [hidden, config.intermediate_size], [config.intermediate_size, hidden]];
  const layer = { attention, mlp, all: [...attention, ...mlp] }[which];
  return Array.from({ length: config.num_hidden_layers }, () => layer).flat();
}

// Bytes of keys and values that one token takes in the KV cache.
function kvBytesPerToken(config, elementBytes) {
  const heads = config.num_attention_heads;
  const headDim = config.head_dim || config.hidden_size / heads;
  return 2 * config.num_hidden_layers * (config.num_key_value_heads || heads) * headDim * elementBytes;
}

// Tokens that the KV cache holds: whole blocks, and no more than all sequences at full length can use.
function kvTokens(config, elementBytes, { memory, blockSize, maxModelLen, maxNumSeqs }) {
  const fit = Math.floor(memory / (kvBytesPerToken(config, elementBytes) * blockSize));
  return Math.min(fit, maxNumSeqs * Math.ceil(maxModelLen / blockSize)) * blockSize;
}

const UNITS = { KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30 };

function readBytes(text) {
  const [, number, unit] = /^\s*([\d.]+)\s*([KMG]iB)?\s*$/.exec(text) || [];
  return number === undefined ? NaN : Number(number) * (unit ? UNITS[unit] : 1);
}

function showBytes(bytes) {
  const unit = ["GiB", "MiB", "KiB"].find((each) => bytes >= UNITS[each]);
  return unit ? `${(bytes / UNITS[unit]).toFixed(bytes / UNITS[unit] < 10 ? 2 : 1)} ${unit}` : `${bytes} bytes`;
}

function calculate(form) {
  const value = (name) => form.elements[name].value;
  const config = Object.fromEntries(
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"]
      .map((name) => [name, Number(value(name)) || undefined]),
  );
  const elementBytes = Number(value("element"));
  const adapter = adapterBytes(moduleShapes(config, value("modules")), Number(value("rank")), elementBytes);
  const token = kvBytesPerToken(config, elementBytes);
  const kv = { memory: readBytes(value("kv")), blockSize: 16, maxModelLen: Infinity, maxNumSeqs: 1 };
  const fit = Math.floor(readBytes(value("memory")) / adapter);
  return {
    adapter: showBytes(adapter),
    fit: Number.isFinite(fit) ? fit.toLocaleString("en") : "–",
    token: showBytes(token),
    tokens: Number.isFinite(kv.memory) ? kvTokens(config, elementBytes, kv).toLocaleString("en") : "–",
  };
}

if (typeof document !== "undefined") {
  const form = document.getElementById("calculator");
  const show = () => {
    for (const [name, text] of Object.entries(calculate(form))) form.elements[name].value = text;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.config.addEventListener("change", async (event) => {
    const config = JSON.parse(await event.target.files[0].text());
    for (const name of Object.keys(config)) if (form.elements[name] && name !== "config") form.elements[name].value = config[name];
    show();
  });
  show();
}

if (typeof module !== "undefined") module.exports = { adapterBytes, moduleShapes, kvBytesPerToken, kvTokens, readBytes, showBytes };
