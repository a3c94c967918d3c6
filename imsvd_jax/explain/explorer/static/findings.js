/* Pages of images that repeat others, and of images with rare codes. */
"use strict";

const MAX_MEMBERS = 24;  // Shown of a group.

pages.duplicates = async () => {
  const [raw, all] = await Promise.all([load("duplicates"), images()]);
  const repeated = raw.groups.reduce((sum, [slots]) => sum + slots.length, 0);
  return [
    heading("Duplicates"),
    h("p", { class: "soft" }, "Groups of images whose features have a cosine "
      + `of at least ${raw.threshold} with those of the first one. Look at `
      + "them before you delete anything: where an encoder ignores what "
      + "differs, different images are groups, too."),
    h("p", { class: "soft small", id: "found" },
      `${number(raw.groups.length)} groups of ${countImages(repeated)}; `
      + `${number(raw.compared)} were compared.`),
    raw.groups.map((group, k) => lazily(
      h("div", { class: "bin", "data-group": k }),
      (node) => fillGroup(node, all, k, group))),
  ];
};

function fillGroup(node, all, k, [slots, cosines]) {
  const more = slots.length - MAX_MEMBERS;
  node.replaceChildren(
    h("div", { class: "what" }, h("h2", {}, `Group ${k + 1}`),
      h("div", {}, countImages(slots.length)),
      more > 0 && h("div", {}, `${number(more)} of them not shown`)),
    h("div", { class: "strip" }, slots.slice(0, MAX_MEMBERS).map((slot, i) => {
      const text = i ? cosines[i].toFixed(4) : "first";
      return withCaption(thumb(all, slot,
        { note: i ? `cosine ${text}` : text }), text);
    })));
}

pages.outliers = async () => {
  const [raw, all] = await Promise.all([load("outliers"), images()]);
  const what = raw.by === "pairs"
    ? "the sum over variables of the mean −log p of a bin, given the bin of "
      + "another variable"
    : "the sum over variables of −log p of the bin";
  return [
    heading("Outliers"),
    h("p", { class: "soft" }, `The ${countImages(raw.slots.length)} of the `
      + `rarest codes, the rarest first. Below each, in nats: ${what}. Half `
      + `of the images have less than ${raw.median} nats. p is that of the `
      + `${countImages(core.numShown)} of this explorer.`),
    h("div", { class: "strip", id: "outliers" }, raw.slots.map((slot, i) => {
      const nats = raw.nats[i].toFixed(1);
      return withCaption(thumb(all, slot, { note: `${nats} nats` }), nats);
    })),
  ];
};
