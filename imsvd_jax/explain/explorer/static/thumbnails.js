/* Thumbnails, their attribution overlays and their tooltips. */
"use strict";

let overlay = "none";

/* What may be drawn over an image of a bin: its name, and in a caption. */
const OVERLAYS = {
  cam: ["Grad-CAM", "Grad-CAM of this bin"],
  fine: ["Integrated gradients", "integrated gradients of this bin"],
  patches: ["Patches in this bin", "patches whose own code is this bin"],
  attention: ["Attention", "attention of the last block"],
};

/* Selects what is drawn over thumbnails; refill() draws them again. */
function overlayChoice(refill) {
  const kinds = [["none", "Image only"],
    ...(core.overlays || []).map((kind) => [kind, OVERLAYS[kind][0]])];
  if (kinds.length < 2) return null;
  return choice("Overlay", kinds, overlay, (value) => {
    overlay = value;
    refill();
  }, "overlay");
}

/* Shows an image of the sprite sheets as the background of a node. */
function sprite(node, slot, size) {
  const { side, perSheet, extension } = core.sprite;
  const place = slot % perSheet;
  const row = Math.floor(place / side);
  node.style.backgroundImage =
    `url("sprites/${Math.floor(slot / perSheet)}.${extension}")`;
  node.style.backgroundSize = `calc(${side} * ${size})`;
  node.style.backgroundPosition =
    `calc(${-(place % side)} * ${size}) calc(${-row} * ${size})`;
  if (core.sprite.size <= 32) node.classList.add("pixel");
  return node;
}

/* Draws an attribution map as heat. */
function heat(map) {
  const table = palette("heat");
  const small = fillPixels(document.createElement("canvas"), map.width,
    map.height, (i) => table[map.levels[i]]);
  const large = h("canvas", { "aria-hidden": "true" });
  large.width = large.height = 96;
  const target = large.getContext("2d");
  target.imageSmoothingEnabled = !map.sharp;
  target.imageSmoothingQuality = "high";
  target.drawImage(small, 0, 0, 96, 96);
  return large;
}

/* The map of the image at a rank of a bin, or null where there is none. */
function mapOf({ data, bin, rank }, kind) {
  const maps = data[kind];
  if (!maps || rank >= maps.perBin) return null;
  const size = maps.height * maps.width;
  const start = (bin * maps.perBin + rank) * size;
  return { width: maps.width, height: maps.height, sharp: kind === "patches",
    levels: maps.maps.subarray(start, start + size) };
}

function imageName(all, slot) {
  return all.names ? all.names[slot] : `Image ${all.indices[slot]}`;
}

/* The known factors of an image, as [name, value] pairs. */
function imageFacts(all, slot) {
  return core.factors.map((factor, f) =>
    [factor.name, factor.values[all.factors[f][slot]]])
    .filter(([, value]) => value !== undefined);
}

const factTexts = (all, slot) => imageFacts(all, slot).map(([name, value]) =>
  `${name}: ${value}`);

/* A link to an image; its tooltip shows the image large, beside its
   attribution.

   Options: note, a line of text; outside, whether to dim it; attribution
   {data, bin, rank}. */
function thumb(all, slot, options = {}) {
  const label = [imageName(all, slot), ...factTexts(all, slot)];
  if (options.note) label.push(options.note);
  const node = h("a", {
    class: options.outside ? "thumb outside" : "thumb",
    href: `#/image/${all.indices[slot]}`,
    "aria-label": label.join(", "),
  });
  sprite(node, slot, "var(--thumb)");
  if (options.attribution && overlay !== "none") {
    const map = mapOf(options.attribution, overlay);
    if (map) node.append(heat(map));
  }
  hint(node, () => imageTip(all, slot, options));
  return node;
}

function large(slot, map) {
  const size = "min(148px, calc(50vw - 40px))";
  const node = h("div", { class: "thumb", style: { width: size,
    height: size } });
  sprite(node, slot, size);
  if (map) node.append(heat(map));
  return node;
}

function imageTip(all, slot, options = {}) {
  const pair = h("div", { class: "pair" }, large(slot));
  let caption = "";
  if (options.attribution) {
    const kinds = [overlay, ...Object.keys(OVERLAYS)];
    const kind = kinds.find((k) => mapOf(options.attribution, k));
    if (kind) {
      pair.append(large(slot, mapOf(options.attribution, kind)));
      caption = `Right: ${OVERLAYS[kind][1]}`;
    }
  }
  return [pair, h("div", {}, h("b", {}, imageName(all, slot))),
    h("div", { class: "soft" }, [`index ${all.indices[slot]}`,
      ...factTexts(all, slot), options.note].filter(Boolean).join(" · ")),
    caption && h("div", { class: "soft" }, caption)];
}
