/* Images that were selected on the map: they filter the other pages. */
"use strict";

let selection = null;  // A set of slots; null: all images.

const isSelected = (slot) => !selection || selection.has(slot);

/* Selects slots; none of them: all images. */
function select(slots) {
  selection = slots.length ? new Set(slots) : null;
  say(selection ? `${countImages(selection.size)} selected`
    : "All images are shown");
}

/* Says that a page shows the selection only; null where it shows all. */
function selectionNote() {
  if (!selection) return null;
  return h("p", { class: "note", id: "selection" },
    `Only the ${countImages(selection.size)} selected on the `,
    h("a", { href: "#/map" }, "map"), ". ",
    h("button", { type: "button", onclick: () => { select([]); route(); } },
      "Show all"));
}

/* The selected slots in each bin of variable m. */
function selectedByBin(all, m) {
  const bins = range(core.numBins).map(() => []);
  const start = m * all.indices.length;
  for (const slot of selection) bins[all.codes[start + slot]].push(slot);
  return bins;
}

/* How much the bins of the selected images differ from those of all:
   bin, the most common one of the selection, and its share; divergence,
   sum p log(p / q) in nats; byChance, whether as many images at random
   would differ as much (2 n divergence is then chi-squared). */
function tellOf(all, m) {
  const counts = selectedByBin(all, m).map((slots) => slots.length);
  const bin = counts.indexOf(Math.max(...counts));
  const usage = core.usage[m];
  let divergence = 0;
  counts.forEach((count, d) => {
    const p = count / selection.size;
    if (p) divergence += p * Math.log(p * core.numImages / usage[d]);
  });
  const freedom = usage.filter((n) => n).length - 1;
  const usual = freedom + 3 * Math.sqrt(2 * freedom);
  return { bin, share: counts[bin] / selection.size, divergence,
    byChance: 2 * selection.size * divergence <= usual };
}
