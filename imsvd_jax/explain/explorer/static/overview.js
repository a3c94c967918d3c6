/* The page of the whole encoder: indicators, charts and tables. */
"use strict";

pages.overview = () => {
  const tables = [];
  if (core.best.length && core.hasCodes) tables.push(bestSection());
  if (core.pairs?.length) tables.push(pairsSection());
  return [
    heading("What the encoder learned"),
    h("p", { class: "lede" }, core.summary),
    core.sentence && h("p", { class: "note" }, core.sentence),
    h("div", { class: "cards" }, core.health.map(card)),
    core.hasCodes && entropySection(),
    tables.length && h("section", { class: "split" }, tables),
    core.interventions && flipSection(core.interventions, {
      id: "interventions", what: "factor",
      how: "Each image is drawn twice, the second time with one factor of "
        + "another image.",
      title: "What flips when one factor changes" }),
    core.edits && flipSection(core.edits, { id: "edits", what: "edit",
      how: "Each image is encoded twice, the second time edited in one way.",
      title: "What flips when an image is edited" }),
    core.views && viewsSection(),
    core.spectrum && spectrumSection(),
    h("section", {}, h("p", { class: "soft small" }, scope())),
  ];
};

function card(item) {
  return h("div", { class: "card" }, h("h3", {}, item.name,
      h("span", { class: `level ${item.level}` }, item.level)),
    h("div", { class: "value" }, item.value),
    h("div", { class: `meter ${item.level}`, "aria-hidden": "true" },
      h("i", { style: { width: percent(clamp(item.share, 0, 1)) } })),
    h("p", {}, item.meaning));
}

function scope() {
  const all = `All numbers are computed on all ${number(core.numImages)} `
    + "images. ";
  const shown = core.numShown < core.numImages
    ? `The pages show ${number(core.numShown)} of them: the best of every `
      + "bin and a uniform sample. " : "The pages show all of them. ";
  return `${all}${shown}The scan of the data took ${core.seconds} s.`;
}

function entropySection() {
  const values = core.variables.entropy;
  const most = Math.log(core.numBins);
  const order = range(values.length).sort((a, b) => values[b] - values[a]);
  return h("section", {}, h("h2", {}, "Entropy of each variable"),
    h("p", { class: "soft small" }, "Sorted. The line at the top is the "
      + `maximum for ${core.numBins} bins, ${nats(most)}. The numbers are `
      + "in the ", h("a", { href: "#/variables" }, "table of variables"),
      "."),
    barChart(order.map((m) => values[m]),
      "Entropy of each variable, largest first", {
        most, unit: nats,
        tip: (i) => [`Variable ${order[i]}`,
          `${nats(values[order[i]])} of ${nats(most)}`],
        open: (i) => { location.hash = `#/variable/${order[i]}`; },
        axis: ["largest", `${values.length} variables`, "smallest"],
      }));
}

function spectrumSection() {
  const values = core.spectrum;
  return h("section", {}, h("h2", {}, "Spectrum of the features"),
    h("p", { class: "soft small" }, "Share of the variance of each principal "
      + `component${values.length < core.numFeatures
        ? `, the first ${values.length} of ${core.numFeatures}` : ""}.`),
    barChart(values, "Share of the variance of each principal component", {
      unit: (x) => percent(x),
      tip: (i) => [`Component ${i + 1}`, `${percent(values[i], 2)} of the `
        + "variance"],
      axis: ["1", "principal components", String(values.length)],
    }));
}

/* Which variables flip when one thing of the images changes. */
function flipSection({ factors, images, flips, selectivity }, words) {
  const share = ([rate, low, high]) => h("td", { class: "share",
    title: `95% interval ${percent(low)} to ${percent(high)}`,
    style: { background: "color-mix(in srgb, var(--accent) "
      + `${Math.round(45 * rate)}%, transparent)` } }, percent(rate, 0));
  const rows = factors.map((factor, k) => h("tr", {},
    h("th", { scope: "row" }, factor), h("td", {}, number(images[k])),
    flips[k].map(share)));
  const best = selectivity.map((one) => h("tr", {},
    h("th", { scope: "row" }, one.factor), h("td", {},
      variableLink(one.variable)), h("td", {}, percent(one.flips)),
    h("td", {}, percent(one.others)),
    h("td", {}, `${one.ratio.toFixed(1)} [${one.low.toFixed(1)}, `
      + `${one.high.toFixed(1)}]`)));
  const head = words.what[0].toUpperCase() + words.what.slice(1);
  return h("section", { class: "views", id: words.id },
    table(words.title, `${words.how} Numbers are the share of images whose `
      + `bin flips; their 95% intervals are in ${words.id}.csv and appear `
      + "under the pointer.",
    [[head], ["Images"], ...range(core.numVariables).map((m) =>
      [variableLink(m), "share"])], rows),
    best.length && table(`The variable of each ${words.what}`, "Chosen on one "
      + "half of the images; the numbers are of the other half. Ratio: its "
      + "flips over the mean of the others, with a 95% interval.",
    [[head], ["Variable"], ["Flips"], ["Others"], ["Ratio"]], best));
}

/* Columns are [label, class] pairs. */
function table(title, text, columns, rows) {
  return h("div", {},
    h("h2", {}, title), h("p", { class: "soft small" }, text),
    h("div", { class: "scroll", tabindex: "0", role: "region",
      "aria-label": title }, h("table", {}, h("thead", {}, h("tr", {}, columns.map(([label, style]) =>
        h("th", { scope: "col", class: style }, label)))),
      h("tbody", {}, rows))));
}

function bestSection() {
  const before = core.best.some((row) => row.untrained !== null);
  const variables = (row) => row.variables.slice(0, 4).flatMap((m, i) => [
    h("span", { class: "item" }, variableLink(m),
      ` ${row.nmi[i].toFixed(2)}`), " "]);
  return table("Best variables for each factor",
    "Normalized mutual information (NMI) with each known factor of the "
      + `images. ${before ? "Random: the best variable of the same network "
        + "with random weights. " : ""}Chance: the value expected of `
      + "independent variables on this number of images.",
    [["Factor"], ["Best variables", "text"], ...(before ? [["Random"]] : []),
      ["Chance"]],
    core.best.map((row) => h("tr", {},
      h("th", { scope: "row" }, row.factor),
      h("td", { class: "text items" }, variables(row)),
      before && h("td", {}, row.untrained.toFixed(2)),
      h("td", {}, row.chance.toFixed(3)))));
}

function pairsSection() {
  return table("Most redundant pairs",
    "Mutual information in nats. Floor: the value expected of independent "
      + "variables on this number of images.",
    [["Pair"], ["Information"], ["Floor"], ["Above floor"]],
    core.pairs.slice(0, 8).map(([a, b, value, floor]) => h("tr", {},
      h("th", { scope: "row" },
        h("a", { href: `#/matrix/${a}/${b}` }, `v${a} × v${b}`)),
      h("td", {}, value.toFixed(3)), h("td", {}, floor.toFixed(3)),
      h("td", {}, (value - floor).toFixed(3)))));
}

function viewsSection() {
  const { indices, probabilities } = core.views;
  const box = h("div", { class: "views" }, h("p", { class: "loading" },
    "Loading…"));
  typed(Uint8Array, probabilities).then((q) => {
    const size = q.length / indices.length / 2;
    box.replaceChildren(...indices.map((index, row) => examples(index, row,
      [0, 1].map((view) => q.subarray((2 * row + view) * size,
        (2 * row + view + 1) * size)))));
  });
  return h("section", {}, h("h2", {}, "Two views of one image"),
    h("p", { class: "soft small" }, "Each column is a variable, each row a "
      + "bin; a stronger color is a higher probability. The two pictures of "
      + "an invariant code are the same."),
  h("div", { class: "legend" },
    h("span", {}, `across: variables 0 to ${core.numVariables - 1}`),
    h("span", {}, `down: bins 0 to ${core.numBins - 1}`),
    h("span", {}, "probability: 0", ramp("sequential"), "1")), box);
}

/* Two views of one image beside their codes; codes: [M, b] bytes each. */
function examples(index, row, codes) {
  const { numVariables, numBins } = core;
  const bins = codes.map((code) => range(numVariables).map((m) => {
    const q = code.subarray(m * numBins, (m + 1) * numBins);
    return q.indexOf(Math.max(...q));
  }));
  const same = range(numVariables).filter((m) => bins[0][m] === bins[1][m]);
  const images = [0, 1].map((view) => h("img", { loading: "lazy",
    class: core.sprite.size <= 32 ? "pixel" : null,
    src: `views/${row}_${view}.png`,
    alt: `View ${view + 1} of image ${index}` }));
  const pictures = [0, 1].map((view) => codePicture(codes[view], bins,
    `Codes of view ${view + 1} of image ${index}`, view ? "0" : "8px"));
  return h("div", { class: "view" }, h("div", {}, images),
    h("div", {}, pictures, h("div", { class: "small soft" },
      `${same.length} of ${numVariables} variables agree`)));
}

function codePicture(code, bins, label, marginBottom) {
  const { numVariables, numBins } = core;
  const canvas = h("canvas", { role: "img", style: { height: "60px",
    marginBottom }, "aria-label": label, onpointerleave: hideTip });
  const draw = () => {
    const table = palette("sequential");
    fillPixels(canvas, numVariables, numBins, (i) => table[
      code[(i % numVariables) * numBins + Math.floor(i / numVariables)]]);
  };
  draw();
  page.redraws.push(draw);
  canvas.addEventListener("pointermove", (event) => {
    const m = clamp(Math.floor(event.offsetX / canvas.clientWidth
      * numVariables), 0, numVariables - 1);
    showTextTip([`Variable ${m}`,
      `view 1: bin ${bins[0][m]}, view 2: bin ${bins[1][m]}`],
    event.clientX, event.clientY);
  });
  return canvas;
}
