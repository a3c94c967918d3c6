/* From the address to a page; tabs, search and keys. Runs last. */
"use strict";

function tabs() {
  return [["overview", "Overview", true],
    ["variables", "Variables", core.hasCodes], ["images", "Images", true],
    ["matrix", "Matrix", core.information], ["map", "Map", core.hasMap],
    ["duplicates", "Duplicates", core.hasNeighbors],
    ["outliers", "Outliers", core.hasCodes],
  ].filter(([, , isShown]) => isShown);
}

/* The tab that a page belongs to. */
const tabOf = (name) => ({ variable: "variables", image: "images" }[name]
  || name);

/* "#/variable/3/1?q=x" is page "variable", first 3, second 1, query q=x. */
function parse(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/");
  const [first, second] = rest.map((text) => (/^\d+$/.test(text) ? +text
    : undefined));
  return { name: name || "overview", first, second,
    query: new URLSearchParams(query) };
}

async function nodesOf(address) {
  const { name } = address;
  if (!pages[name] || !tabs().some(([tab]) => tab === tabOf(name))) {
    return missing(`“${name}”`);
  }
  try {
    return await pages[name](address);
  } catch (error) {
    return [heading("Could not load this page"), h("p", {}, error.message)];
  }
}

let ticket = 0;
let routed = false;

async function route() {
  const mine = ++ticket;
  hideTip();
  page.cleanups.forEach((clean) => clean());
  Object.assign(page, { redraws: [], cleanups: [], afterShow: null });
  const address = parse(location.hash);
  const nodes = await nodesOf(address);
  if (mine !== ticket) return;  // Another page was asked for meanwhile.
  const main = $("main");
  main.replaceChildren(...nodes.flat().filter(Boolean));
  const title = main.querySelector("h1");
  document.title = `${title.textContent} · ${core.title}`;
  document.querySelectorAll("#tabs a").forEach((link) => {
    const isOpen = link.dataset.page === tabOf(address.name);
    link.ariaCurrent = isOpen ? "page" : null;
    if (isOpen) link.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  scrollTo(0, 0);
  if (routed) title.focus({ preventScroll: true });
  routed = true;
  page.afterShow?.();
  main.dataset.ready = location.hash || "#/overview";
}

function search(text) {
  const wanted = text.trim().match(/^(?:v|variable)\s*(\d+)$/i);
  if (wanted && core.hasCodes) location.hash = `#/variable/${+wanted[1]}`;
  else location.hash = `#/images?q=${encodeURIComponent(text.trim())}`;
}

function nextOverlay() {
  const select = $("overlay");
  if (!select) return;
  select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
  select.dispatchEvent(new Event("change"));
  say(`Overlay: ${select.selectedOptions[0].textContent}`);
}

function keyboard(event) {
  if (event.key === "Escape") hideTip();
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select, textarea") || $("help").open) {
    return;
  }
  if (event.key === "/") {
    event.preventDefault();
    $("find").focus();
  } else if (event.key === "?") $("help").showModal();
  else if (event.key === "[") $("previous")?.click();
  else if (event.key === "]") $("next")?.click();
  else if (event.key === "o") nextOverlay();
  else if (/^[1-7]$/.test(event.key)) {
    const tab = tabs()[event.key - 1];
    if (tab) location.hash = `#/${tab[0]}`;
  }
}

$("tabs").replaceChildren(...tabs().map(([name, label]) =>
  h("a", { href: `#/${name}`, "data-page": name }, label)));
$("find-form").addEventListener("submit", (event) => {
  event.preventDefault();
  search($("find").value);
});
$("keys").addEventListener("click", () => $("help").showModal());
addEventListener("hashchange", route);
addEventListener("keydown", keyboard);
addEventListener("scroll", hideTip, { passive: true });
route();
