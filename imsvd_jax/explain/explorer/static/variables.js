/* The table of all variables, and the page of one. */
"use strict";

let sorting = { key: "number", ascending: true };
const direction = () => (sorting.ascending ? "ascending" : "descending");

/* Columns {key, label, get(m): the value to sort by, show(m): what the cell
   shows, up: whether to sort the smallest first}. */
function columnsOf(table) {
  const plain = (key, label, values, format) => ({ key, label,
    get: (m) => values[m], show: (m) => format(values[m]) });
  const decimals = (digits) => (x) => x.toFixed(digits);
  const result = [
    { key: "number", label: "Variable", get: (m) => m, up: true,
      show: variableLink },
    { key: "usage", label: "Images per bin, largest bin first", get: (m) => table.usedBins[m],
      show: (m) => sparkline([...core.usage[m]].sort((a, b) => b - a)) },
    plain("entropy", "Entropy (nats)", table.entropy, decimals(3)),
    plain("effective", "Effective bins", table.effectiveBins, decimals(1)),
    plain("used", "Used bins", table.usedBins, number),
    plain("largest", "Largest bin", table.largest, (x) => percent(x)),
    plain("confidence", "Confidence", table.confidence, decimals(3)),
  ];
  if (table.agreement) {
    result.push(plain("agreement", "Agreement of views", table.agreement,
      (x) => percent(x)));
  }
  if (table.shared) {
    result.push({ key: "shared", label: "Redundancy (nats)",
      get: (m) => table.shared[m], show: (m) => [
        `${table.shared[m].toFixed(3)} with `,
        variableLink(table.partner[m])] });
  }
  core.factors.forEach((factor, f) => {
    if (!table.nmi) return;
    result.push(plain(`factor ${f}`, `NMI ${factor.name}`, table.nmi[f],
      decimals(3)));
  });
  core.edits?.factors.forEach((name, k) => {
    result.push(plain(`flip ${name}`, `Flips: ${name}`,
      core.edits.flips[k].map(([rate]) => rate), (x) => percent(x, 0)));
  });
  return result;
}

/* Columns about the selected images; `told` is by variable. */
function selectionColumns(told) {
  return [
    { key: "divergence", label: "Divergence of the selection (nats)",
      get: (m) => told[m].divergence,
      show: (m) => told[m].divergence.toFixed(3) },
    { key: "share", label: "Most common bin of the selection",
      get: (m) => told[m].share, show: (m) => [
        h("a", { href: `#/variable/${m}/${told[m].bin}` },
          `bin ${told[m].bin}`), ` ${percent(told[m].share, 0)}`] },
  ];
}

pages.variables = async () => {
  const columns = columnsOf(core.variables);
  let told = null;
  if (selection) {
    const all = await images();
    told = range(core.numVariables).map((m) => tellOf(all, m));
    columns.splice(1, 0, ...selectionColumns(told));
    sorting = { key: "divergence", ascending: false };
  } else if (!columns.some((c) => c.key === sorting.key)) {
    sorting = { key: "number", ascending: true };
  }
  const shown = range(core.numVariables).filter((m) => !told?.[m].byChance);
  const body = h("tbody", {});
  const rows = range(core.numVariables).map((m) => h("tr", { "data-m": m },
    columns.map((column, i) => h(i ? "td" : "th",
      i ? {} : { scope: "row" }, column.show(m)))));
  const heads = columns.map((column) => h("th", { scope: "col" },
    h("button", { type: "button", onclick: () => sortBy(column) },
      column.label)));
  const show = () => {
    const column = columns.find((c) => c.key === sorting.key) || columns[0];
    const sign = sorting.ascending ? 1 : -1;
    const order = [...shown].sort((a, b) =>
      sign * (column.get(a) - column.get(b)) || a - b);
    body.replaceChildren(...order.map((m) => rows[m]));
    columns.forEach((c, i) => {
      heads[i].ariaSort = c === column ? direction() : null;
    });
  };
  const sortBy = (column) => {
    sorting = sorting.key === column.key
      ? { key: column.key, ascending: !sorting.ascending }
      : { key: column.key, ascending: Boolean(column.up) };
    show();
    say(`Sorted by ${column.label}, ${direction()}`);
  };
  show();
  return [
    heading("Variables"),
    h("p", { class: "soft" }, `${core.numVariables} variables of `
      + `${core.numBins} bins. Select a heading to sort by it.`),
    selectionNote(), told && h("p", { class: "soft", id: "told" },
      `${shown.length} variables put the selected images into other bins `
      + "than all images; the rest, which differ as random images would, are "
      + "left out. Divergence: sum p log(p / q) of the selection's bins p and "
      + "those of all images, q."),
    h("div", { class: "scroll tall", tabindex: "0", role: "region",
      "aria-label": "Table of variables" },
    h("table", { id: "variables" }, h("thead", {}, h("tr", {}, heads)), body)),
  ];
};

const MAX_CHOSEN = 24;  // Selected images that are shown of a bin.
let binOrder = "number";
let binFactor = 0;

pages.variable = async ({ first: m, second: litBin }) => {
  if (!(m >= 0 && m < core.numVariables)) return missing(`Variable ${m}`);
  const [data, all] = await Promise.all([variable(m), images()]);
  const usage = core.usage[m];
  const list = h("div", { id: "bins" });
  const chosen = selection && selectedByBin(all, m);
  const fill = () => {
    const counts = data.counts[core.factors[binFactor]?.name];
    const order = orderOfBins(usage, counts, binOrder)
      .filter((d) => !chosen || chosen[d].length);
    list.replaceChildren(...order.map((d) => lazily(
      h("div", { class: "bin", "data-bin": d }),
      (node) => fillBin(node, all, data, m, d, counts?.[d], chosen?.[d]))));
  };
  fill();
  const light = (d) => {
    list.querySelectorAll(".lit").forEach((n) => n.classList.remove("lit"));
    const node = list.querySelector(`[data-bin="${d}"]`);
    if (!node) return;  // None of its images are selected.
    node.classList.add("lit");
    node.scrollIntoView({ block: "center" });
  };
  if (litBin !== undefined && litBin < core.numBins) {
    requestAnimationFrame(() => light(litBin));
  }
  return [
    h("div", { class: "head" }, heading(`Variable ${m}`),
      stepLinks("#/variable/", m ? m - 1 : undefined,
        m + 1 < core.numVariables ? m + 1 : undefined)),
    facts(variableFacts(m)),
    h("p", { class: "soft" }, relations(m)),
    usageChart(m, light),
    h("section", {}, selectionNote(),
      h("div", { class: "head" }, h("h2", {}, chosen
        ? "Bins and their selected images" : "Bins and their best images"),
        h("div", { class: "controls" }, binControls(fill))),
      list),
  ];
};

/* Images in each bin, empty bins last. */
function usageChart(m, open) {
  const usage = core.usage[m];
  const order = orderOfBins(usage, null, "number");
  const empty = usage.filter((n) => !n).length;
  const last = empty ? `${empty} empty` : `bin ${core.numBins - 1}`;
  return barChart(order.map((d) => usage[d]),
    `Images in each of the ${core.numBins} bins`, {
      unit: (n) => countImages(Math.round(n)),
      tip: (i) => {
        const n = usage[order[i]];
        return [binTitle(m, order[i]).replace("b", "B"), `${countImages(n)}, `
          + percent(n / core.numImages)];
      },
      open: (i) => open(order[i]),
      axis: [`bin ${order[0]}`, "images in each bin", last],
    });
}

function variableFacts(m) {
  const table = core.variables;
  const result = [
    ["Entropy", `${table.entropy[m].toFixed(2)} of `
      + `${Math.log(core.numBins).toFixed(2)} nats`],
    ["Effective bins", table.effectiveBins[m].toFixed(1)],
    ["Used bins", `${table.usedBins[m]} of ${core.numBins}`],
    ["Confidence", table.confidence[m].toFixed(2)],
  ];
  if (table.agreement) {
    result.push(["Views agree", percent(table.agreement[m], 0)]);
  }
  core.factors.forEach((factor, f) => {
    if (table.nmi && table.nmi[f][m] > 3 * table.chance[f][m]
        && table.nmi[f][m] > 0.1) {
      result.push([`NMI ${factor.name}`, table.nmi[f][m].toFixed(2)]);
    }
  });
  return result;
}

/* The most redundant variable, and the augmentations that change the bin. */
function relations(m) {
  const table = core.variables;
  const partner = table.partner?.[m];
  const flips = (core.edits?.factors ?? []).map((name, k) =>
    [name, core.edits.flips[k][m][0]]).sort((a, b) => b[1] - a[1]);
  return [
    ...(partner === undefined ? [] : [
      "Most redundant with ", variableLink(partner),
      `: mutual information ${nats(table.shared[m])} above the floor (`,
      h("a", { href: `#/matrix/${m}/${partner}` }, "joint matrix"), "). "]),
    flips.length ? `The bin changes most often under ${flips[0][0]} `
      + `(${percent(flips[0][1], 0)}) and least often under `
      + `${flips.at(-1)[0]} (${percent(flips.at(-1)[1], 0)}). ` : "",
    intervened(m),
  ];
}

/* The factor whose change flips the variable most often. */
function intervened(m) {
  if (!core.interventions) return "";
  const { factors, flips } = core.interventions;
  const rates = flips.map((row) => row[m]);
  const k = rates.indexOf(rates.reduce((a, b) => (b[0] > a[0] ? b : a)));
  const [rate, low, high] = rates[k].map((x) => percent(x, 0));
  return `Of all factors, a change of ${factors[k]} flips it most often: `
    + `${rate} [${low}, ${high}].`;
}

function binControls(fill) {
  return [
    choice("Order", [["number", "by number"], ["usage", "by usage"],
      ...(core.factors.length ? [["purity", "by purity"]] : [])],
    binOrder, (value) => { binOrder = value; fill(); }),
    core.factors.length > 1 && choice("Factor",
      core.factors.map((f, i) => [String(i), f.name]),
      String(binFactor), (value) => { binFactor = +value; fill(); }),
    overlayChoice(fill),
  ];
}

/* Bins by "number", "usage" or "purity"; empty ones always last. */
function orderOfBins(usage, counts, by) {
  const purity = (d) => (counts && usage[d]
    ? Math.max(...counts[d]) / usage[d] : -1);
  const key = { number: (d) => d, usage: (d) => -usage[d],
    purity: (d) => -purity(d) }[by];
  return range(core.numBins).sort((a, b) => !usage[a] - !usage[b]
    || key(a) - key(b) || a - b);
}

/* Fills a bin with its best images, or with those of a selection. */
function fillBin(node, all, data, m, d, counts, chosen) {
  const usage = core.usage[m][d];
  const caption = core.captions[`${m}/${d}`];
  const what = h("div", { class: "what" }, h("h3", {}, `Bin ${d}`),
    caption && h("div", { title: "Chosen on one half of the images, confirmed "
      + `on the other: precision ${percent(caption[1], 0)}, `
      + `lift ${caption[2]}` }, caption[0]),
    h("div", {}, `${countImages(usage)} · `
      + `${percent(usage / core.numImages)}`),
    chosen && h("div", {}, `${number(chosen.length)} selected`),
    counts && classes(counts));
  const strip = h("div", { class: "strip" });
  if (chosen) {
    strip.append(...chosen.slice(0, MAX_CHOSEN).map((slot) =>
      thumb(all, slot)));
    node.replaceChildren(what, strip);
    return;
  }
  // An image where this bin is probable may be in one that is more so.
  const isMember = (slot) => all.codes[m * all.indices.length + slot] === d;
  data.slots[d].forEach((slot, rank) => {
    if (slot < 0) return;
    const q = `q = ${data.scores[d][rank].toFixed(3)}`;
    const outside = !isMember(slot);
    strip.append(thumb(all, slot, {
      note: outside ? `${q}, not in this bin` : q, outside,
      attribution: { data, bin: d, rank } }));
  });
  if (strip.querySelector(".outside")) {
    what.append(h("div", {}, "Dimmed: not in this bin"));
  }
  node.replaceChildren(what, strip);
}

/* The most frequent classes of a bin: a stacked bar, and names. */
function classes(counts) {
  const total = counts.reduce((a, b) => a + b, 0);
  if (!total) return null;
  const order = range(counts.length).sort((a, b) => counts[b] - counts[a])
    .slice(0, 3).filter((k) => counts[k]);
  const names = core.factors[binFactor].values;
  return [
    h("div", { class: "stack", "aria-hidden": "true" }, order.map((k) =>
      h("i", { style: { width: percent(counts[k] / total),
        background: category(k, counts.length) } }))),
    h("div", {}, order.slice(0, 2).filter((k, i) => i === 0
      || counts[k] >= 0.005 * total).map((k) => `${names[k]} `
      + `${percent(counts[k] / total, 0)}`).join(", ")),
  ];
}
