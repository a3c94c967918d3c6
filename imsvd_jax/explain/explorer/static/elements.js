/* Elements, text and tooltips that all pages use. */
"use strict";

// --- Numbers and text ----------------------------------------------------

const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)}%`;
const number = (x) => x.toLocaleString("en");
const countImages = (n) => `${number(n)} image${n === 1 ? "" : "s"}`;
const nats = (x) => `${x.toFixed(x < 0.1 ? 3 : 2)} nats`;
const probability = (p) => (p >= 0.001 || p === 0 ? p.toPrecision(2)
  : p.toExponential(1));
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const range = (n) => Array.from({ length: n }, (_, i) => i);

// --- Elements ------------------------------------------------------------

const $ = (id) => document.getElementById(id);

/* h("a", {href: "#"}, "text", node): text becomes text nodes. */
function h(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined
    && c !== false));
  return node;
}

const heading = (text) => h("h1", { tabindex: "-1" }, text);
/* A bin's number, and its name where it has one. */
function binTitle(m, d) {
  const caption = core.captions[`${m}/${d}`];
  return caption ? `bin ${d}: ${caption[0]}` : `bin ${d}`;
}
const variableLink = (m) => h("a", { href: `#/variable/${m}` }, `v${m}`);

/* A list of [name, value] pairs. */
function facts(pairs) {
  return h("dl", { class: "facts" }, pairs.map(([name, value]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

/* Links to the pages before and after this one, dimmed where there is none. */
function stepLinks(base, previous, next) {
  const link = (label, target) => {
    const dead = target === undefined;
    return h("a", { class: "button", href: dead ? null : base + target,
      "aria-disabled": dead ? "true" : null, id: label.toLowerCase(),
      style: dead ? { opacity: 0.45 } : {} }, label);
  };
  return h("div", { class: "controls" }, link("Previous", previous),
    link("Next", next));
}

/* A labeled select; options are [key, text] pairs. */
function choice(label, options, value, change, id) {
  const select = h("select", { id, onchange: () => change(select.value) },
    options.map(([key, text]) => h("option", { value: key,
      selected: key === value }, text)));
  return h("label", {}, label, select);
}

function missing(what, why = "") {
  return [heading("Not found"),
    h("p", {}, `${what} is not in this explorer. ${why}`),
    h("p", {}, h("a", { href: "#/overview" }, "Back to the overview"))];
}

/* Announces text to screen readers. */
function say(text) { $("live").textContent = text; }

// --- The current page ----------------------------------------------------

/* What the current page wants to be called; routing.js empties it.
   redraws: when the theme changes; cleanups: when another page opens;
   afterShow: when the nodes of the page are in the document. */
const page = { redraws: [], cleanups: [], afterShow: null };

const lazyWork = new WeakMap();
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    observer.unobserve(entry.target);
    lazyWork.get(entry.target)?.(entry.target);
  }
}, { rootMargin: "300px" });

/* Delays act() to the next frame, however often it is asked for. */
function oncePerFrame(act) {
  let asked = false;
  return () => {
    if (!asked) requestAnimationFrame(() => { asked = false; act(); });
    asked = true;
  };
}

/* Calls work(node) once the node is near the screen. */
function lazily(node, work) {
  lazyWork.set(node, work);
  observer.observe(node);
  return node;
}

// --- Tooltip -------------------------------------------------------------

const tip = $("tip");

function showTip(content, x, y) {
  tip.replaceChildren(...content.filter(Boolean));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  /* Beside the point, before it where there is no room behind it. */
  const place = (at, size, room) => {
    const start = at + 16 + size > room - 8 ? at - 16 - size : at + 16;
    return `${clamp(start, 8, Math.max(8, room - size - 8))}px`;
  };
  tip.style.left = place(x, box.width, innerWidth);
  tip.style.top = place(y, box.height, innerHeight);
}

/* A tooltip of lines of text, the first one bold. */
function showTextTip([title, ...lines], x, y) {
  showTip([h("b", {}, title), ...lines.map((l) => h("div", {}, l))], x, y);
}

function hideTip() { tip.hidden = true; }

/* Shows content() while the pointer or the focus is on a node. */
function hint(node, content) {
  const show = () => {
    const box = node.getBoundingClientRect();
    showTip(content(), box.left + box.width / 2, box.bottom - 10);
  };
  node.addEventListener("pointerenter", (event) => {
    if (event.pointerType !== "touch") show();
  });
  node.addEventListener("pointerleave", hideTip);
  node.addEventListener("focus", () => {
    if (node.matches(":focus-visible")) show();
  });
  node.addEventListener("blur", hideTip);
}
