/* The grid of all images with its search, and the page of one image. */
"use strict";

pages.images = async ({ query }) => {
  const all = await images();
  const text = h("input", { type: "search", value: query.get("q") || "",
    id: "image-search", placeholder: "Index, name or label",
    "aria-label": "Search images" });
  const status = h("p", { class: "soft small", role: "status" });
  const grid = h("div", { class: "grid", id: "grid" });
  const show = () => {
    const found = searchImages(all, text.value).filter(isSelected);
    status.textContent = `${number(found.length)} of `
      + countImages(all.indices.length);
    fillGrid(grid, found.length, (i) => thumb(all, found[i]));
  };
  let timer;
  text.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(show, 120);
  });
  page.afterShow = show;
  return [
    heading("Images"),
    h("p", { class: "soft" }, core.hasCodes
      ? "Select an image to see its codes and the images that share them."
      : "Select an image to see its nearest neighbors."),
    selectionNote(), h("div", { class: "controls" }, text), status, grid,
  ];
};

/* Slots of the images whose index, name or labels match every word. */
function searchImages(all, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const slots = range(all.indices.length);
  if (!words.length) return slots;
  const labels = core.factors.map((f) => f.values.map((v) => v.toLowerCase()));
  const found = slots.filter((slot) => {
    const name = all.names ? all.names[slot].toLowerCase() : "";
    return words.every((word) => String(all.indices[slot]) === word
      || name.includes(word) || labels.some((values, f) => {
      const value = all.factors[f][slot];
      return value >= 0 && values[value].includes(word);
    }));
  });
  // The image with exactly this index comes first.
  const exact = /^\d+$/.test(words[0]) ? all.slotOf.get(+words[0]) : undefined;
  return exact === undefined || words.length > 1 ? found
    : [exact, ...found.filter((slot) => slot !== exact)];
}

/* Fills a box with cells make(0), make(1), ...; only those near the screen
   exist. */
function fillGrid(box, count, make) {
  box.dispose?.();
  const size = parseInt(getComputedStyle(document.documentElement)
    .getPropertyValue("--thumb"), 10);
  const pitch = size + 6;
  const cells = new Map();
  box.replaceChildren();
  const update = () => {
    const across = Math.max(1, Math.floor((box.clientWidth + 6) / pitch));
    box.style.height = `${Math.ceil(count / across) * pitch}px`;
    const top = -box.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor((top - 400) / pitch)) * across;
    const last = Math.min(count,
      Math.ceil((top + innerHeight + 400) / pitch) * across);
    for (const [i, node] of cells) {
      const moved = node.across !== across;
      if (i >= first && i < last && !moved) continue;
      if (node.contains(document.activeElement) && !moved) continue;
      node.remove();
      cells.delete(i);
    }
    for (let i = first; i < last; i++) {
      if (cells.has(i)) continue;
      const node = make(i);
      node.across = across;
      node.style.left = `${(i % across) * pitch}px`;
      node.style.top = `${Math.floor(i / across) * pitch}px`;
      // In order, so that Tab walks the grid as it is read.
      box.insertBefore(node, cells.get(i + 1) || null);
      cells.set(i, node);
    }
  };
  const ask = oncePerFrame(update);
  addEventListener("scroll", ask, { passive: true });
  addEventListener("resize", ask);
  box.dispose = () => {
    removeEventListener("scroll", ask);
    removeEventListener("resize", ask);
  };
  page.cleanups.push(box.dispose);
  update();
}

pages.image = async ({ first: index }) => {
  const all = await images();
  const slot = all.slotOf.get(index);
  if (slot === undefined) {
    return missing(`Image ${index}`, "It is not among the shown images.");
  }
  const picture = h("div", { class: "thumb", role: "img",
    "aria-label": imageName(all, slot),
    style: { width: "168px", height: "168px" } });
  sprite(picture, slot, "168px");
  const nodes = [
    h("div", { class: "head" }, heading("Image"),
      stepLinks("#/image/", all.indices[slot - 1], all.indices[slot + 1])),
    h("div", { class: "hero" }, picture, h("div", {},
      h("h2", { id: "image-name" }, imageName(all, slot)),
      facts([["Index", String(index)], ...imageFacts(all, slot)]),
      all.links?.[slot] && h("p", {}, h("a", { id: "file",
        href: all.links[slot], target: "_blank", rel: "noreferrer" },
      "Open the original file")))),
  ];
  const required = new Set();  // Variables whose bin must be the same.
  const sharing = core.hasCodes && sharedSection(all, slot, required);
  if (core.hasCodes) nodes.push(sharing.section);
  if (core.hasNeighbors) nodes.push(await neighborSection(all, slot));
  if (core.hasCodes) {
    nodes.push(codesSection(all, slot, required, sharing.show));
  }
  return nodes;
};

const withCaption = (node, text) => h("div", { class: "figure" }, node, text);

/* The section, and a function that fills it for the variables required. */
function sharedSection(all, slot, required) {
  const strip = h("div", { class: "strip", id: "sharing" });
  const status = h("p", { class: "soft small", role: "status" });
  const show = () => {
    const { counts, matches } = countShared(all, slot, required);
    const what = [...required].map((m) => `v${m}`).join(", ");
    status.textContent = required.size
      ? `${number(matches)} other images have the same bins in ${what}. `
        + "The most similar of them:"
      : "The images with the most variables in the same bin, and their "
        + "number of such variables.";
    strip.replaceChildren(...largest(counts, slot, 24).map((i) => {
      const text = `${counts[i]} of ${core.numVariables}`;
      return withCaption(thumb(all, i, { note: `${text} codes shared` }), text);
    }));
  };
  show();
  const title = h("h2", {}, "Images that share these codes");
  return { section: h("section", {}, title, status, strip), show };
}

/* Counts equal codes with every shown image, column by column: below 0 where a
   required one differs. */
function countShared(all, slot, required) {
  const count = all.indices.length;
  const counts = new Int32Array(count);
  const never = -core.numVariables - 1;  // Below 0, whatever follows.
  for (let m = 0; m < core.numVariables; m++) {
    const start = m * count;
    const code = all.codes[start + slot];
    const isRequired = required.has(m);
    for (let i = 0; i < count; i++) {
      if (all.codes[start + i] === code) counts[i]++;
      else if (isRequired) counts[i] = never;
    }
  }
  return { counts, matches: counts.filter((c) => c >= 0).length - 1 };
}

/* The k largest counts, equal ones by place; no full sort. */
function largest(counts, except, k) {
  const buckets = range(core.numVariables + 1).map(() => []);
  counts.forEach((c, i) => {
    if (c >= 0 && i !== except && buckets[c].length < k) buckets[c].push(i);
  });
  return buckets.reverse().flat().slice(0, k);
}

async function neighborSection(all, slot) {
  const near = await neighbors();
  const row = near.rows.get(slot);
  if (row === undefined) {
    return h("section", {}, h("h2", {}, "Nearest in feature space"),
      h("p", { class: "soft" }, "The features of this image were not kept: "
        + "it is not in the sample."));
  }
  return h("section", {}, h("h2", {}, "Nearest in feature space"),
    h("p", { class: "soft small" }, "By cosine similarity of the features."),
    h("div", { class: "strip" }, range(near.count).map((k) => {
      const place = row * near.count + k;
      const cosine = (near.cosines[place] / 255).toFixed(2);
      return withCaption(thumb(all, near.slots[place],
        { note: `cosine ${cosine}` }), cosine);
    })));
}

/* Buttons that require a bin; changed() is called after each press. */
function codesSection(all, slot, required, changed) {
  const count = all.indices.length;
  const chip = (m) => {
    const d = all.codes[m * count + slot];
    const button = h("button", { type: "button", "aria-pressed": "false",
      "aria-label": `Require bin ${d} of variable ${m}`,
      onclick: () => {
        if (!required.delete(m)) required.add(m);
        button.setAttribute("aria-pressed", String(required.has(m)));
        changed();
      } }, `bin ${d}`,
    h("span", {}, percent(core.usage[m][d] / core.numImages)));
    const caption = core.captions[`${m}/${d}`];
    return h("div", { class: "chip" }, h("a", {
      href: `#/variable/${m}/${d}`,
      "aria-label": `Variable ${m}, ${binTitle(m, d)}` }, `v${m}`), button,
    caption && h("div", { class: "name" }, caption[0]));
  };
  return h("section", {}, h("h2", {}, "Codes"),
    h("p", { class: "soft small" }, "Variable, bin, and the share of images "
      + "in that bin. Select bins to require them above."),
    h("div", { class: "chips" }, range(core.numVariables).map(chip)));
}
