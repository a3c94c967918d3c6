/* Loads the explorer's data.

   The explorer is a set of plain scripts, because a page opened from disk may
   import no modules. They share one scope and run in the order of index.html.

   A page opened from disk may not fetch either. So the files in data/ are
   scripts, too, and call receive. Text from the data set reaches the page only
   through textContent or attributes, never as markup. */
"use strict";

let core;  // Tables of the whole analysis: data/core.js.
const pages = {};  // name -> ({first, second, query}) -> nodes, or a promise.
const requests = new Map();

function receive(name, value) {
  if (name === "core") core = value;
  else requests.get(name)?.resolve(value);
}

/* Loads data/NAME.js once. */
function load(name) {
  if (requests.has(name)) return requests.get(name).promise;
  const request = {};
  request.promise = new Promise((resolve, reject) => {
    request.resolve = resolve;
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onload = () => script.remove();
    script.onerror = () => reject(new Error(`data/${name}.js is missing.`));
    document.head.append(script);
  });
  requests.set(name, request);
  return request.promise;
}

const forget = (name) => requests.delete(name);

/* Adds an entry to a map; beyond `most` entries, drops the oldest. */
function remember(map, key, value, most, drop) {
  map.set(key, value);
  if (map.size <= most) return;
  const [oldest] = map.keys();
  map.delete(oldest);
  drop?.(oldest);
}

function bytes(base64) {
  const text = atob(base64);
  const result = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) result[i] = text.charCodeAt(i);
  return result;
}

async function inflate(base64) {
  const stream = new Blob([bytes(base64)]).stream()
    .pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

const typed = async (Type, base64) => new Type(await inflate(base64));
const floats = (base64) => new Float32Array(bytes(base64).buffer);

/* A promise-valued function that runs once. */
function once(make) {
  let value;
  return () => (value ??= make());
}

/* The shown images: their indices, names, factors and codes. A slot is the
   position of an image in these arrays. */
const images = once(async () => {
  const raw = await load("images");
  const result = { names: raw.names, links: raw.links, factors: [] };
  result.indices = await typed(Int32Array, raw.indices);
  for (const { wide, values } of raw.factors) {
    result.factors.push(await typed(wide ? Int32Array : Int16Array, values));
  }
  if (raw.codes) {
    result.codes = await typed(raw.wide ? Uint16Array : Uint8Array, raw.codes);
  }
  result.slotOf = new Map();
  result.indices.forEach((index, slot) => result.slotOf.set(index, slot));
  forget("images");
  return result;
});

const neighbors = once(async () => {
  const raw = await load("neighbors");
  const rows = new Map();
  (await typed(Int32Array, raw.slots)).forEach((slot, row) =>
    rows.set(slot, row));
  return {
    count: raw.count, rows,
    slots: await typed(Int32Array, raw.neighbors),
    cosines: await typed(Uint8Array, raw.cosines),
  };
});

const MAX_VARIABLES = 12;  // In memory; the oldest is dropped.
const variables = new Map();

/* Best images of every bin of variable m, and their attribution maps. */
async function variable(m) {
  if (variables.has(m)) return variables.get(m);
  const raw = await load(`variable_${m}`);
  const result = { slots: raw.slots, scores: raw.scores, counts: raw.counts };
  for (const kind of core.overlays) {
    const { perBin, height, width, maps } = raw[kind];
    result[kind] = { perBin, height, width,
      maps: await typed(Uint8Array, maps) };
  }
  remember(variables, m, result, MAX_VARIABLES,
    (old) => forget(`variable_${old}`));
  return result;
}
