/* The explorer. Plain JavaScript, no network: data arrive as scripts that call
   explorer.receive. Text from the data set reaches the page only through
   textContent or attributes, never as markup. */
"use strict";

const explorer = (() => {
  // --- Data ----------------------------------------------------------------

  const arrived = new Map();
  const waiting = new Map();

  function receive(name, value) {
    arrived.set(name, value);
    const entry = waiting.get(name);
    if (entry) entry.resolve(value);
    else if (name === "core") start(value);
  }

  /* Loads data/NAME.js once; a page opened from disk may not fetch. */
  function load(name) {
    if (waiting.has(name)) return waiting.get(name).promise;
    const entry = {};
    entry.promise = new Promise((resolve, reject) => {
      entry.resolve = resolve;
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => script.remove();
      script.onerror = () => reject(new Error(`data/${name}.js is missing.`));
      document.head.append(script);
    });
    waiting.set(name, entry);
    return entry.promise;
  }

  function forget(name) {
    waiting.delete(name);
    arrived.delete(name);
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

  const floats = (base64) => new Float32Array(bytes(base64).buffer);

  /* A promise-valued function that runs once. */
  function once(make) {
    let value;
    return () => (value ??= make());
  }

  let core;
  let columns = {};

  const images = once(async () => {
    const raw = await load("images");
    const result = { names: raw.names, factors: [] };
    result.indices = new Int32Array(await inflate(raw.indices));
    for (const factor of raw.factors) {
      const buffer = await inflate(factor.values);
      result.factors.push(factor.wide ? new Int32Array(buffer)
        : new Int16Array(buffer));
    }
    if (raw.codes) {
      const buffer = await inflate(raw.codes);
      result.codes = raw.wide ? new Uint16Array(buffer)
        : new Uint8Array(buffer);
    }
    result.slotOf = new Map();
    result.indices.forEach((index, slot) => result.slotOf.set(index, slot));
    forget("images");
    return result;
  });

  const neighbours = once(async () => {
    const raw = await load("neighbours");
    const slots = new Int32Array(await inflate(raw.slots));
    const rows = new Map();
    slots.forEach((slot, row) => rows.set(slot, row));
    return {
      count: raw.count, rows,
      slots: new Int32Array(await inflate(raw.neighbours)),
      cosines: new Uint8Array(await inflate(raw.cosines)),
    };
  });

  const variableCache = new Map();

  async function variable(m) {
    if (variableCache.has(m)) return variableCache.get(m);
    const raw = await load(`variable_${m}`);
    const result = { slots: raw.slots, scores: raw.scores, counts: raw.counts };
    for (const kind of ["cam", "fine"]) {
      if (!raw[kind]) continue;
      const { perBin, height, width, maps } = raw[kind];
      result[kind] = { perBin, height, width,
        maps: new Uint8Array(await inflate(maps)) };
    }
    variableCache.set(m, result);
    if (variableCache.size > 12) {
      const oldest = variableCache.keys().next().value;
      variableCache.delete(oldest);
      forget(`variable_${oldest}`);
    }
    return result;
  }

  // --- Small helpers -------------------------------------------------------

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

  const $ = (id) => document.getElementById(id);
  const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)}%`;
  const number = (x) => x.toLocaleString("en");
  const nats = (x) => `${x.toFixed(x < 0.1 ? 3 : 2)} nats`;
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
  const range = (n) => Array.from({ length: n }, (_, i) => i);
  const probability = (p) => (p >= 0.001 || p === 0 ? p.toPrecision(2)
    : p.toExponential(1));

  function say(text) { $("live").textContent = text; }

  function canvasFor(node) {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const box = node.getBoundingClientRect();
    node.width = Math.max(1, Math.round(box.width * ratio));
    node.height = Math.max(1, Math.round(box.height * ratio));
    const context = node.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    return [context, box.width, box.height];
  }

  const token = (name) => getComputedStyle(document.documentElement)
    .getPropertyValue(name).trim();
  const isDark = () => document.documentElement.dataset.theme === "dark";
  const palettes = {};

  function palette(kind) {
    const name = kind === "heat" ? "heat" : kind === "ratio"
      ? (isDark() ? "ratioDark" : "ratioLight") : (isDark() ? "dark" : "light");
    return (palettes[name] ??= bytes(core.colours[name]));
  }

  const colourOf = (table, level) => {
    const i = 3 * clamp(Math.round(level * 255), 0, 255);
    return `rgb(${table[i]},${table[i + 1]},${table[i + 2]})`;
  };

  const CATEGORIES = ["#3a7ca5", "#d1803c", "#4f9d69", "#b5525c", "#7d6bb0",
    "#9a7b4f", "#c86fa5", "#7f8c8d", "#a3a533", "#35a0a8"];
  const category = (k, count) => (count <= 10 ? CATEGORIES[k]
    : `hsl(${Math.round((k * 360) / count)} 58% ${k % 2 ? 58 : 46}%)`);

  // --- Lazy work: draw what is near the screen -----------------------------

  const lazyWork = new WeakMap();
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      observer.unobserve(entry.target);
      const work = lazyWork.get(entry.target);
      if (work) work(entry.target);
    }
  }, { rootMargin: "300px" });

  function lazily(node, work) {
    lazyWork.set(node, work);
    observer.observe(node);
    return node;
  }

  // --- Thumbnails and overlays ---------------------------------------------

  let overlay = "none";

  function overlayKinds() {
    const kinds = [["none", "Image only"]];
    if (core.overlays?.cam) kinds.push(["cam", "Grad-CAM"]);
    if (core.overlays?.fine) kinds.push(["fine", "Integrated gradients"]);
    return kinds;
  }

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

  /* Draws an attribution map as heat whose opacity follows its strength. */
  function heat(map) {
    const table = palette("heat");
    const small = document.createElement("canvas");
    small.width = map.width;
    small.height = map.height;
    const context = small.getContext("2d");
    const pixels = context.createImageData(map.width, map.height);
    map.levels.forEach((level, i) => {
      pixels.data.set([table[3 * level], table[3 * level + 1],
        table[3 * level + 2], Math.round(level * 0.72)], 4 * i);
    });
    context.putImageData(pixels, 0, 0);
    const large = h("canvas", { "aria-hidden": "true" });
    large.width = large.height = 96;
    const target = large.getContext("2d");
    target.imageSmoothingQuality = "high";
    target.drawImage(small, 0, 0, 96, 96);
    return large;
  }

  function mapOf(data, kind, bin, rank) {
    const maps = data?.[kind];
    if (!maps || rank >= maps.perBin) return null;
    const size = maps.height * maps.width;
    const start = (bin * maps.perBin + rank) * size;
    return { width: maps.width, height: maps.height,
      levels: maps.maps.subarray(start, start + size) };
  }

  function imageName(all, slot) {
    const index = all.indices[slot];
    return all.names ? all.names[slot] : `Image ${index}`;
  }

  function imageFacts(all, slot) {
    const facts = [];
    core.factors.forEach((factor, f) => {
      const value = all.factors[f][slot];
      if (value >= 0) facts.push(`${factor.name}: ${factor.values[value]}`);
    });
    return facts;
  }

  /* One image: a link whose tooltip shows it large, beside its attribution. */
  function thumb(all, slot, options = {}) {
    const label = [imageName(all, slot), ...imageFacts(all, slot)];
    if (options.note) label.push(options.note);
    const node = h("a", {
      class: options.outside ? "thumb outside" : "thumb",
      href: `#/image/${all.indices[slot]}`,
      "aria-label": label.join(", "),
    });
    sprite(node, slot, "var(--thumb)");
    const at = options.attribution;
    if (at && overlay !== "none") {
      const map = mapOf(at.data, overlay, at.bin, at.rank);
      if (map) node.append(heat(map));
    }
    hint(node, () => imageTip(all, slot, options));
    return node;
  }

  function large(slot, extra) {
    const size = "min(148px, calc(50vw - 40px))";
    const node = h("div", { class: "thumb", style: { width: size,
      height: size } });
    sprite(node, slot, size);
    if (extra) node.append(heat(extra));
    return node;
  }

  function imageTip(all, slot, options) {
    const pair = h("div", { class: "pair" }, large(slot));
    const at = options.attribution;
    let caption = "";
    if (at) {
      const kinds = overlay === "none" ? ["cam", "fine"]
        : [overlay, "cam", "fine"];
      for (const kind of kinds) {
        const map = mapOf(at.data, kind, at.bin, at.rank);
        if (!map) continue;
        pair.append(large(slot, map));
        caption = kind === "cam" ? "Right: Grad-CAM of this bin"
          : "Right: integrated gradients of this bin";
        break;
      }
    }
    return [pair, h("div", {}, h("b", {}, imageName(all, slot))),
      h("div", { class: "soft" }, [`index ${all.indices[slot]}`,
        ...imageFacts(all, slot), options.note].filter(Boolean).join(" · ")),
      caption && h("div", { class: "soft" }, caption)];
  }

  // --- Tooltip -------------------------------------------------------------

  const tip = $("tip");
  let tipOwner = null;

  function showTip(content, x, y, owner) {
    tip.replaceChildren(...content.filter(Boolean));
    tip.hidden = false;
    tipOwner = owner;
    const box = tip.getBoundingClientRect();
    const gap = 16;
    let left = x + gap;
    if (left + box.width > innerWidth - 8) left = x - gap - box.width;
    let top = y + gap;
    if (top + box.height > innerHeight - 8) top = y - gap - box.height;
    tip.style.left = `${clamp(left, 8, Math.max(8, innerWidth - box.width
      - 8))}px`;
    tip.style.top = `${clamp(top, 8, Math.max(8, innerHeight - box.height
      - 8))}px`;
  }

  function hideTip() {
    tip.hidden = true;
    tipOwner = null;
  }

  function hint(node, content) {
    const show = () => {
      const box = node.getBoundingClientRect();
      showTip(content(), box.left + box.width / 2, box.bottom - 10, node);
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

  // --- Pages: overview -----------------------------------------------------

  function overviewPage() {
    const nodes = [
      h("h1", { tabindex: "-1" }, "What it learned"),
      h("p", { class: "lede" }, core.summary),
    ];
    if (core.sentence) nodes.push(h("p", { class: "note" }, core.sentence));
    nodes.push(h("div", { class: "cards" }, core.health.map((item) =>
      h("div", { class: "card" },
        h("h3", {}, item.name,
          h("span", { class: `level ${item.level}` }, item.level)),
        h("div", { class: "value" }, item.value),
        h("div", { class: `meter ${item.level}`, "aria-hidden": "true" },
          h("i", { style: { width: percent(clamp(item.share, 0, 1)) } })),
        h("p", {}, item.meaning)))));
    if (core.hasCodes) nodes.push(entropySection());
    const tables = [];
    if (core.best.length && core.hasCodes) tables.push(bestSection());
    if (core.pairs?.length) tables.push(pairsSection());
    if (tables.length) {
      nodes.push(h("section", { class: "split" }, tables));
    }
    if (core.views) nodes.push(viewsSection());
    if (core.spectrum) nodes.push(spectrumSection());
    nodes.push(h("section", {}, h("p", { class: "soft small" },
      core.numShown < core.numImages
        ? `Every number is over all ${number(core.numImages)} images. `
          + `${number(core.numShown)} of them are shown: the best of every bin `
          + "and a uniform sample."
        : `Every number is over all ${number(core.numImages)} images, and all `
          + "of them are shown.",
      ` The pass took ${core.seconds} s.`)));
    return nodes;
  }

  /* Bars with a tooltip each, drawn when they are near the screen. */
  function barChart(values, label, options) {
    const canvas = h("canvas", { class: "chart", role: "img",
      "aria-label": label });
    const most = options.most ?? Math.max(...values, 1e-12);
    const draw = () => {
      const [context, width, height] = canvasFor(canvas);
      const step = width / values.length;
      context.fillStyle = token("--line");
      context.fillRect(0, 0.5, width, 1);
      context.fillStyle = token("--accent");
      values.forEach((value, i) => {
        const tall = Math.max((value / most) * (height - 2), value ? 1 : 0);
        context.fillRect(i * step, height - tall,
          Math.max(step * 0.78, 0.5), tall);
      });
    };
    lazily(canvas, draw);
    redraws.push(draw);
    const at = (event) => clamp(Math.floor(event.offsetX / canvas.clientWidth
      * values.length), 0, values.length - 1);
    canvas.addEventListener("pointermove", (event) => {
      const [title, ...lines] = options.tip(at(event));
      showTip([h("b", {}, title), ...lines.map((l) => h("div", {}, l))],
        event.clientX, event.clientY, canvas);
    });
    canvas.addEventListener("pointerleave", hideTip);
    if (options.open) {
      canvas.style.cursor = "pointer";
      canvas.addEventListener("click", (event) => options.open(at(event)));
    }
    return h("div", { class: "bars" }, canvas, h("div", { class: "axis" },
      options.axis.map((text) => h("span", {}, text))));
  }

  function entropySection() {
    const values = core.variables.entropy;
    const most = Math.log(core.numBins);
    const order = range(values.length).sort((a, b) => values[b] - values[a]);
    return h("section", {},
      h("h2", {}, "Entropy of each variable"),
      h("p", { class: "soft small" }, "Sorted; the line above is the most that "
        + `${core.numBins} bins can hold, ${nats(most)}. The same numbers are `
        + "in the ", h("a", { href: "#/variables" }, "table of variables"),
        "."),
      barChart(order.map((m) => values[m]),
        "Entropy of each variable, largest first", {
          most,
          tip: (i) => [`Variable ${order[i]}`,
            `${nats(values[order[i]])} of ${nats(most)}`],
          open: (i) => { location.hash = `#/variable/${order[i]}`; },
          axis: ["most", `${values.length} variables`, "least"],
        }));
  }

  function spectrumSection() {
    const values = core.spectrum;
    return h("section", {},
      h("h2", {}, "Spectrum of the features"),
      h("p", { class: "soft small" }, "Share of the variance in each principal "
        + `direction${values.length < core.numFeatures
          ? `, the first ${values.length} of ${core.numFeatures}` : ""}.`),
      barChart(values, "Share of variance of each principal direction", {
        tip: (i) => [`Direction ${i + 1}`, `${percent(values[i], 2)} of the `
          + "variance"],
        axis: ["1", "principal directions", String(values.length)],
      }));
  }

  const variableLink = (m) => h("a", { href: `#/variable/${m}` }, `v${m}`);

  function bestSection() {
    const before = core.best.some((row) => row.untrained !== null);
    return h("div", {},
      h("h2", {}, "Which variables know what"),
      h("p", { class: "soft small" }, "Normalized mutual information with "
        + "everything known about the images; "
        + (before ? "random is the best variable of the same network with "
          + "random weights, " : "")
        + "chance is what independent variables would show on so many "
        + "images."),
      h("div", { class: "scroll" }, h("table", {},
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Factor"),
          h("th", { scope: "col", class: "text" }, "Best variables"),
          before && h("th", { scope: "col" }, "Random"),
          h("th", { scope: "col" }, "Chance"))),
        h("tbody", {}, core.best.map((row) => h("tr", {},
          h("th", { scope: "row" }, row.factor),
          h("td", { class: "text items" }, row.variables.slice(0, 4).flatMap(
            (m, i) => [h("span", { class: "item" }, variableLink(m),
              ` ${row.nmi[i].toFixed(2)}`), " "])),
          before && h("td", {}, row.untrained.toFixed(2)),
          h("td", {}, row.chance.toFixed(3))))))));
  }

  function pairsSection() {
    return h("div", {},
      h("h2", {}, "Most redundant pairs"),
      h("p", { class: "soft small" }, "Mutual information in nats, and the "
        + "floor that independent variables would show on so many images."),
      h("div", { class: "scroll" }, h("table", {},
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Pair"),
          h("th", { scope: "col" }, "Information"),
          h("th", { scope: "col" }, "Floor"),
          h("th", { scope: "col" }, "Above floor"))),
        h("tbody", {}, core.pairs.slice(0, 8).map(([a, b, value, floor]) =>
          h("tr", {}, h("th", { scope: "row" },
            h("a", { href: `#/matrix/${a}/${b}` }, `v${a} × v${b}`)),
          h("td", {}, value.toFixed(3)), h("td", {}, floor.toFixed(3)),
          h("td", {}, (value - floor).toFixed(3))))))));
  }

  function viewsSection() {
    const { indices, probabilities } = core.views;
    const { numVariables: M, numBins: b } = core;
    const box = h("div", { class: "views" }, h("p", { class: "loading" },
      "Loading…"));
    inflate(probabilities).then((buffer) => {
      const q = new Uint8Array(buffer);
      box.replaceChildren(...indices.map((index, row) => {
        const arg = (view, m) => {
          const start = ((row * 2 + view) * M + m) * b;
          let best = 0;
          for (let d = 1; d < b; d++) {
            if (q[start + d] > q[start + best]) best = d;
          }
          return best;
        };
        const same = range(M).filter((m) => arg(0, m) === arg(1, m));
        const picture = (view) => {
          const canvas = h("canvas", { role: "img", style: { height: "60px",
            marginBottom: view ? "0" : "8px" }, "aria-label":
            `Codes of view ${view + 1} of image ${index}` });
          const draw = () => {
            canvas.width = M;
            canvas.height = b;
            const context = canvas.getContext("2d");
            const pixels = context.createImageData(M, b);
            const table = palette("sequential");
            for (let m = 0; m < M; m++) {
              for (let d = 0; d < b; d++) {
                const level = q[((row * 2 + view) * M + m) * b + d];
                pixels.data.set([table[3 * level], table[3 * level + 1],
                  table[3 * level + 2], 255], 4 * (d * M + m));
              }
            }
            context.putImageData(pixels, 0, 0);
          };
          draw();
          redraws.push(draw);
          canvas.addEventListener("pointermove", (event) => {
            const m = clamp(Math.floor(event.offsetX / canvas.clientWidth * M),
              0, M - 1);
            showTip([h("div", {}, h("b", {}, `Variable ${m}`)),
              h("div", {}, `view 1: bin ${arg(0, m)}, view 2: bin ${arg(1, m)}`)
            ], event.clientX, event.clientY, canvas);
          });
          canvas.addEventListener("pointerleave", hideTip);
          return canvas;
        };
        return h("div", { class: "view" },
          h("div", {}, [0, 1].map((view) => h("img", { loading: "lazy",
            class: core.sprite.size <= 32 ? "pixel" : null,
            src: `views/${row}_${view}.png`,
            alt: `View ${view + 1} of image ${index}` }))),
          h("div", {}, picture(0), picture(1), h("div", { class:
            "small soft" }, `${same.length} of ${M} variables agree`)));
      }));
    });
    return h("section", {}, h("h2", {}, "Two views of one image"),
      h("p", { class: "soft small" }, "Each column is a variable, each row a "
        + "bin; the stronger the colour, the more probable. "
        + "An invariant code shows the same picture twice."), box);
  }

  // --- Pages: variables ----------------------------------------------------

  let sorting = { key: "number", ascending: true };

  function variableColumns() {
    const table = core.variables;
    const result = [
      { key: "number", label: "Variable", get: (m) => m, up: true,
        show: (m) => variableLink(m) },
      { key: "usage", label: "Usage of bins", get: (m) =>
        core.variables.usedBins[m], show: (m) => sparkline(m) },
      { key: "entropy", label: "Entropy (nats)", get: (m) => table.entropy[m],
        show: (m) => table.entropy[m].toFixed(3) },
      { key: "effective", label: "Effective bins",
        get: (m) => table.effectiveBins[m],
        show: (m) => table.effectiveBins[m].toFixed(1) },
      { key: "used", label: "Used bins", get: (m) => table.usedBins[m] },
      { key: "largest", label: "Largest bin", get: (m) => table.largest[m],
        show: (m) => percent(table.largest[m]) },
      { key: "confidence", label: "Confidence",
        get: (m) => table.confidence[m],
        show: (m) => table.confidence[m].toFixed(3) },
    ];
    if (table.agreement) {
      result.push({ key: "agreement", label: "Agreement of views",
        get: (m) => table.agreement[m],
        show: (m) => percent(table.agreement[m]) });
    }
    if (table.shared) {
      result.push({ key: "shared", label: "Most shared (nats)",
        get: (m) => table.shared[m], show: (m) => [
          `${table.shared[m].toFixed(3)} with `,
          variableLink(table.partner[m])] });
    }
    core.factors.forEach((factor, f) => {
      if (!table.nmi) return;
      result.push({ key: `factor ${f}`, label: `NMI ${factor.name}`,
        get: (m) => table.nmi[f][m], show: (m) => table.nmi[f][m].toFixed(3) });
    });
    for (const [name, rates] of Object.entries(table.flips)) {
      result.push({ key: `flip ${name}`, label: `Flips: ${name}`,
        get: (m) => rates[m], show: (m) => percent(rates[m], 0) });
    }
    return result;
  }

  function usageBars(canvas, usage) {
    const [context, width, height] = canvasFor(canvas);
    const most = Math.max(...usage, 1);
    const step = width / usage.length;
    context.fillStyle = token("--accent");
    usage.forEach((count, d) => {
      const tall = Math.max(count ? 1 : 0, (count / most) * (height - 1));
      context.fillRect(d * step, height - tall,
        Math.max(step * 0.78, 0.5), tall);
    });
  }

  function sparkline(m) {
    const canvas = h("canvas", { class: "spark", "aria-hidden": "true" });
    const sorted = [...core.usage[m]].sort((a, b) => b - a);
    let drawn = false;
    lazily(canvas, () => { drawn = true; usageBars(canvas, sorted); });
    redraws.push(() => { if (drawn) usageBars(canvas, sorted); });
    return canvas;
  }

  function variablesPage() {
    columns = variableColumns();
    const body = h("tbody", {});
    const rows = range(core.numVariables).map((m) => h("tr", { "data-m": m },
      columns.map((column, i) => h(i ? "td" : "th",
        i ? {} : { scope: "row" }, column.show ? column.show(m)
          : number(column.get(m))))));
    const heads = columns.map((column) => h("th", { scope: "col" },
      h("button", { type: "button", onclick: () => sortBy(column) },
        column.label)));
    const show = () => {
      const column = columns.find((c) => c.key === sorting.key) || columns[0];
      const sign = sorting.ascending ? 1 : -1;
      const order = range(core.numVariables).sort((a, b) =>
        sign * (column.get(a) - column.get(b)) || a - b);
      body.replaceChildren(...order.map((m) => rows[m]));
      columns.forEach((c, i) => {
        if (c === column) {
          heads[i].setAttribute("aria-sort",
            sorting.ascending ? "ascending" : "descending");
        } else heads[i].removeAttribute("aria-sort");
      });
    };
    const sortBy = (column) => {
      sorting = sorting.key === column.key
        ? { key: column.key, ascending: !sorting.ascending }
        : { key: column.key, ascending: Boolean(column.up) };
      show();
      say(`Sorted by ${column.label}, `
        + (sorting.ascending ? "ascending" : "descending"));
    };
    show();
    return [
      h("h1", { tabindex: "-1" }, "Variables"),
      h("p", { class: "soft" }, `${core.numVariables} variables of `
        + `${core.numBins} bins. Choose a heading to sort by it.`),
      h("div", { class: "scroll tall", tabindex: "0", role: "region",
        "aria-label": "Table of variables" },
      h("table", { id: "variables" }, h("thead", {}, h("tr", {}, heads)),
        body)),
    ];
  }

  let binOrder = "number";
  let binFactor = 0;

  async function variablePage(m, litBin) {
    if (!(m >= 0 && m < core.numVariables)) return missing(`Variable ${m}`);
    const [data, all] = await Promise.all([variable(m), images()]);
    const table = core.variables;
    const usage = core.usage[m];
    const facts = [
      ["Entropy", `${table.entropy[m].toFixed(2)} of `
        + `${Math.log(core.numBins).toFixed(2)} nats`],
      ["Effective bins", table.effectiveBins[m].toFixed(1)],
      ["Used bins", `${table.usedBins[m]} of ${core.numBins}`],
      ["Confidence", table.confidence[m].toFixed(2)],
    ];
    if (table.agreement) {
      facts.push(["Views agree", percent(table.agreement[m], 0)]);
    }
    core.factors.forEach((factor, f) => {
      if (table.nmi && table.nmi[f][m] > 3 * table.chance[f][m]
          && table.nmi[f][m] > 0.1) {
        facts.push([`NMI ${factor.name}`, table.nmi[f][m].toFixed(2)]);
      }
    });
    const list = h("div", { id: "bins" });
    const light = (d) => {
      const node = list.querySelector(`[data-bin="${d}"]`);
      list.querySelectorAll(".lit").forEach((n) => n.classList.remove("lit"));
      node.classList.add("lit");
      node.scrollIntoView({ block: "center" });
    };
    const fill = () => {
      const counts = data.counts[core.factors[binFactor]?.name];
      const purity = (d) => (counts && usage[d]
        ? Math.max(...counts[d]) / usage[d] : -1);
      const key = { number: (d) => d, usage: (d) => -usage[d],
        purity: (d) => -purity(d) }[binOrder];
      const order = range(core.numBins).sort((a, b) => key(a) - key(b)
        || a - b);
      list.replaceChildren(...order.map((d) => lazily(
        h("div", { class: "bin", "data-bin": d }),
        (node) => fillBin(node, all, data, m, d, counts?.[d]))));
    };
    fill();
    refill = fill;
    if (litBin !== undefined && litBin < core.numBins) {
      requestAnimationFrame(() => light(litBin));
    }
    const partner = table.partner?.[m];
    const flips = Object.entries(table.flips).map(([name, r]) => [name, r[m]])
      .sort((a, b) => b[1] - a[1]);
    return [
      h("div", { class: "head" },
        h("h1", { tabindex: "-1" }, `Variable ${m}`),
        h("div", { class: "controls" },
          step("Previous", "#/variable/", m - 1, core.numVariables),
          step("Next", "#/variable/", m + 1, core.numVariables))),
      h("dl", { class: "facts" }, facts.map(([name, value]) =>
        h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      h("p", { class: "soft" }, partner === undefined ? "" : [
        "Shares most with ", variableLink(partner),
        `: ${nats(table.shared[m])} above the floor (`,
        h("a", { href: `#/matrix/${m}/${partner}` }, "joint"), "). "],
      flips.length ? `Flips most often under ${flips[0][0]} `
        + `(${percent(flips[0][1], 0)}), least under `
        + `${flips.at(-1)[0]} (${percent(flips.at(-1)[1], 0)}).` : ""),
      barChart(usage, `Images in each of the ${core.numBins} bins`, {
        tip: (d) => [`Bin ${d}`, `${number(usage[d])} images, `
          + percent(usage[d] / core.numImages)],
        open: light,
        axis: ["bin 0", "images in each bin", `bin ${core.numBins - 1}`],
      }),
      h("section", {},
        h("div", { class: "head" }, h("h2", {}, "Bins and their best images"),
          h("div", { class: "controls" },
            choice("Order", [["number", "by number"], ["usage", "by usage"],
              ...(core.factors.length ? [["purity", "by purity"]] : [])],
            binOrder, (value) => { binOrder = value; fill(); }),
            core.factors.length > 1 && choice("Factor",
              core.factors.map((f, i) => [String(i), f.name]),
              String(binFactor), (value) => { binFactor = +value; fill(); }),
            overlayChoice())),
        list),
    ];
  }

  function overlayChoice() {
    const kinds = overlayKinds();
    if (kinds.length < 2) return null;
    return choice("Overlay", kinds, overlay, (value) => {
      overlay = value;
      refill();
    }, "overlay");
  }

  function step(label, base, target, count) {
    const dead = target < 0 || target >= count;
    return h("a", { class: "button", href: dead ? null : base + target,
      "aria-disabled": dead ? "true" : null, id: label.toLowerCase(),
      style: dead ? { opacity: 0.45 } : {} }, label);
  }

  function choice(label, options, value, change, id) {
    const select = h("select", { id, onchange: () => change(select.value) },
      options.map(([key, text]) => h("option", { value: key,
        selected: key === value }, text)));
    return h("label", {}, label, select);
  }

  function fillBin(node, all, data, m, d, counts) {
    const usage = core.usage[m][d];
    const what = h("div", { class: "what" },
      h("h3", {}, `Bin ${d}`),
      h("div", {}, `${number(usage)} images · `
        + `${percent(usage / core.numImages)}`));
    if (counts) {
      const total = counts.reduce((a, b) => a + b, 0);
      const order = range(counts.length).sort((a, b) => counts[b] - counts[a])
        .slice(0, 3).filter((k) => counts[k]);
      const factor = core.factors[binFactor];
      if (total) {
        what.append(
          h("div", { class: "stack", "aria-hidden": "true" }, order.map((k) =>
            h("i", { style: { width: percent(counts[k] / total),
              background: category(k, counts.length) } }))),
          h("div", {}, order.slice(0, 2).filter((k, i) => i === 0
            || counts[k] >= 0.005 * total).map((k) => `${factor.values[k]} `
            + `${percent(counts[k] / total, 0)}`).join(", ")));
      }
    }
    const strip = h("div", { class: "strip" });
    // A bin of few images shows the likeliest others too.
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

  // --- Pages: images -------------------------------------------------------

  async function imagesPage(query) {
    const all = await images();
    const text = h("input", { type: "search", value: query.get("q") || "",
      id: "image-search", placeholder: "Index, name or label",
      "aria-label": "Search images" });
    const status = h("p", { class: "soft small", role: "status" });
    const grid = h("div", { class: "grid", id: "grid" });
    const show = () => {
      const found = searchImages(all, text.value);
      status.textContent = `${number(found.length)} of `
        + `${number(all.indices.length)} images`;
      virtual(grid, found.length, (i) => thumb(all, found[i]));
    };
    let timer;
    text.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(show, 120);
    });
    afterShow = show;
    return [
      h("h1", { tabindex: "-1" }, "Images"),
      h("p", { class: "soft" }, core.hasCodes
        ? "Choose an image to see its codes and which images share them."
        : "Choose an image to see its nearest neighbours."),
      h("div", { class: "controls" }, text), status, grid,
    ];
  }

  function searchImages(all, text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const slots = range(all.indices.length);
    if (!words.length) return slots;
    const labels = core.factors.map((f) => f.values.map((v) =>
      v.toLowerCase()));
    const found = slots.filter((slot) => {
      const name = all.names ? all.names[slot].toLowerCase() : "";
      return words.every((word) => String(all.indices[slot]) === word
        || name.includes(word) || labels.some((values, f) => {
        const value = all.factors[f][slot];
        return value >= 0 && values[value].includes(word);
      }));
    });
    // The image of just this index comes first.
    const exact = /^\d+$/.test(words[0]) ? all.slotOf.get(+words[0])
      : undefined;
    return exact === undefined || words.length > 1 ? found
      : [exact, ...found.filter((slot) => slot !== exact)];
  }

  /* A grid of any length: only cells near the screen exist. */
  function virtual(box, count, make) {
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
        if (i < first || i >= last || node.across !== across) {
          if (node.contains(document.activeElement)
              && node.across === across) continue;
          node.remove();
          cells.delete(i);
        }
      }
      for (let i = first; i < last; i++) {
        if (cells.has(i)) continue;
        const node = make(i);
        node.across = across;
        node.style.left = `${(i % across) * pitch}px`;
        node.style.top = `${Math.floor(i / across) * pitch}px`;
        // In order, so that Tab walks the grid as it is read.
        const next = cells.get(i + 1);
        box.insertBefore(node, next || null);
        cells.set(i, node);
      }
    };
    let asked = false;
    const ask = () => {
      if (asked) return;
      asked = true;
      requestAnimationFrame(() => { asked = false; update(); });
    };
    addEventListener("scroll", ask, { passive: true });
    addEventListener("resize", ask);
    box.dispose = () => {
      removeEventListener("scroll", ask);
      removeEventListener("resize", ask);
    };
    cleanups.push(box.dispose);
    update();
  }

  async function imagePage(index) {
    const all = await images();
    const slot = all.slotOf.get(index);
    if (slot === undefined) {
      return missing(`Image ${index}`, "It is not among the shown images.");
    }
    const facts = imageFacts(all, slot);
    const picture = h("div", { class: "thumb", role: "img",
      "aria-label": imageName(all, slot),
      style: { width: "168px", height: "168px" } });
    sprite(picture, slot, "168px");
    const nodes = [
      h("div", { class: "head" },
        h("h1", { tabindex: "-1" }, "Image"),
        h("div", { class: "controls" },
          step("Previous", "#/image/", slot ? all.indices[slot - 1] : -1,
            Infinity),
          step("Next", "#/image/", slot + 1 < all.indices.length
            ? all.indices[slot + 1] : -1, Infinity))),
      h("div", { class: "hero" }, picture, h("div", {},
        h("h2", { id: "image-name" }, imageName(all, slot)),
        h("dl", { class: "facts" },
          h("div", {}, h("dt", {}, "Index"), h("dd", {}, String(index))),
          facts.map((fact) => {
            const [name, ...value] = fact.split(": ");
            return h("div", {}, h("dt", {}, name),
              h("dd", {}, value.join(": ")));
          })))),
    ];
    if (core.hasCodes) nodes.push(sharedSection(all, slot));
    if (core.hasNeighbours) nodes.push(await neighbourSection(all, slot));
    if (core.hasCodes) nodes.push(codesSection(all, slot));
    return nodes;
  }

  let required = new Set();

  function sharedSection(all, slot) {
    const strip = h("div", { class: "strip", id: "sharing" });
    const status = h("p", { class: "soft small", role: "status" });
    const show = () => {
      const { counts, matches } = sharing(all, slot, required);
      const order = best(counts, slot, 24);
      const what = [...required].map((m) => `v${m}`).join(", ");
      status.textContent = required.size
        ? `${number(matches)} other images have the same bins in ${what}; `
          + "of these, the most alike:"
        : "The images with most variables in the same bin, and how many.";
      strip.replaceChildren(...order.map((i) => h("div", { class: "figure" },
        thumb(all, i, { note: `${counts[i]} of ${core.numVariables} codes `
          + "shared" }), `${counts[i]} of ${core.numVariables}`)));
    };
    required = new Set();
    updateSharing = show;
    show();
    return h("section", {}, h("h2", {}, "Images that share its codes"), status,
      strip);
  }

  /* Counts equal codes with every shown image, column by column. */
  function sharing(all, slot, must) {
    const count = all.indices.length;
    const counts = new Int32Array(count);
    for (let m = 0; m < core.numVariables; m++) {
      const start = m * count;
      const code = all.codes[start + slot];
      for (let i = 0; i < count; i++) {
        if (all.codes[start + i] === code) counts[i]++;
      }
    }
    let matches = 0;
    if (must.size) {
      for (let i = 0; i < count; i++) {
        for (const m of must) {
          if (all.codes[m * count + i] !== all.codes[m * count + slot]) {
            counts[i] = -1;
            break;
          }
        }
        if (counts[i] >= 0 && i !== slot) matches++;
      }
    }
    return { counts, matches };
  }

  /* The k largest counts, equal ones by place; no full sort. */
  function best(counts, except, k) {
    const buckets = range(core.numVariables + 1).map(() => []);
    counts.forEach((c, i) => {
      if (c >= 0 && i !== except && buckets[c].length < k) buckets[c].push(i);
    });
    return buckets.reverse().flat().slice(0, k);
  }

  async function neighbourSection(all, slot) {
    const near = await neighbours();
    const row = near.rows.get(slot);
    if (row === undefined) {
      return h("section", {}, h("h2", {}, "Nearest in feature space"),
        h("p", { class: "soft" }, "Not in the sample whose features were "
          + "kept."));
    }
    return h("section", {}, h("h2", {}, "Nearest in feature space"),
      h("p", { class: "soft small" }, "By the cosine of their features."),
      h("div", { class: "strip" }, range(near.count).map((k) => {
        const other = near.slots[row * near.count + k];
        const cosine = (near.cosines[row * near.count + k] / 255).toFixed(2);
        return h("div", { class: "figure" }, thumb(all, other,
          { note: `cosine ${cosine}` }), cosine);
      })));
  }

  function codesSection(all, slot) {
    const count = all.indices.length;
    return h("section", {}, h("h2", {}, "Its codes"),
      h("p", { class: "soft small" }, "Variable, bin, and the share of images "
        + "in that bin. Press bins to require them above."),
      h("div", { class: "chips" }, range(core.numVariables).map((m) => {
        const d = all.codes[m * count + slot];
        const share = core.usage[m][d] / core.numImages;
        const button = h("button", { type: "button", "aria-pressed": "false",
          "aria-label": `Require bin ${d} of variable ${m}`,
          onclick: () => {
            const on = !required.has(m);
            if (on) required.add(m);
            else required.delete(m);
            button.setAttribute("aria-pressed", String(on));
            updateSharing();
          } }, `bin ${d}`, h("span", {}, percent(share)));
        return h("div", { class: "chip" }, h("a", {
          href: `#/variable/${m}/${d}`,
          "aria-label": `Variable ${m}, bin ${d}` }, `v${m}`), button);
      })));
  }

  // --- Pan and zoom --------------------------------------------------------

  /* Maps the square world [0, size] x [0, size] to a canvas. */
  class View {
    constructor(canvas, size, maxScale, draw) {
      Object.assign(this, { canvas, size, maxScale, draw });
      this.pointers = new Map();
      canvas.addEventListener("wheel", (event) => {
        event.preventDefault();
        this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0018)),
          event.offsetX, event.offsetY);
      }, { passive: false });
      canvas.addEventListener("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
        this.moved = 0;
      });
      canvas.addEventListener("pointermove", (event) => this.move(event));
      for (const name of ["pointerup", "pointercancel"]) {
        canvas.addEventListener(name, (event) =>
          this.pointers.delete(event.pointerId));
      }
      this.resize = () => { this.fit(); };
      addEventListener("resize", this.resize);
      cleanups.push(() => removeEventListener("resize", this.resize));
    }

    get width() { return this.canvas.clientWidth; }

    get height() { return this.canvas.clientHeight; }

    get fitScale() {
      return (Math.min(this.width, this.height) - 24) / this.size;
    }

    fit() {
      this.scale = this.fitScale;
      this.left = (this.size - this.width / this.scale) / 2;
      this.top = (this.size - this.height / this.scale) / 2;
      this.ask();
    }

    centre(x, y, scale) {
      this.scale = clamp(scale, this.fitScale, this.maxScale);
      this.left = x - this.width / this.scale / 2;
      this.top = y - this.height / this.scale / 2;
      this.ask();
    }

    zoom(factor, x = this.width / 2, y = this.height / 2) {
      const [worldX, worldY] = this.world(x, y);
      this.scale = clamp(this.scale * factor, this.fitScale * 0.8,
        this.maxScale);
      this.left = worldX - x / this.scale;
      this.top = worldY - y / this.scale;
      this.ask();
    }

    pan(x, y) {
      this.left -= x / this.scale;
      this.top -= y / this.scale;
      this.left = clamp(this.left, -this.width / this.scale / 2,
        this.size - this.width / this.scale / 2);
      this.top = clamp(this.top, -this.height / this.scale / 2,
        this.size - this.height / this.scale / 2);
      this.ask();
    }

    world(x, y) { return [this.left + x / this.scale, this.top + y / this.scale]; }

    screen(x, y) {
      return [(x - this.left) * this.scale, (y - this.top) * this.scale];
    }

    move(event) {
      const before = this.pointers.get(event.pointerId);
      if (!before) return;
      const now = [event.offsetX, event.offsetY];
      this.moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
      const others = [...this.pointers].filter(([id]) =>
        id !== event.pointerId).map(([, at]) => at);
      if (others.length) {
        const [x, y] = others[0];
        const apart = (p) => Math.max(Math.hypot(p[0] - x, p[1] - y), 1);
        this.zoom(apart(now) / apart(before), x, y);
      } else this.pan(now[0] - before[0], now[1] - before[1]);
      this.pointers.set(event.pointerId, now);
    }

    ask() {
      if (this.asked) return;
      this.asked = true;
      requestAnimationFrame(() => {
        this.asked = false;
        if (this.canvas.isConnected) this.draw();
      });
    }

    buttons() {
      const button = (text, label, act) => h("button", { type: "button",
        "aria-label": label, onclick: act }, text);
      return h("div", { class: "zoom" },
        button("+", "Zoom in", () => this.zoom(1.6)),
        button("−", "Zoom out", () => this.zoom(1 / 1.6)),
        button("⤢", "Fit", () => this.fit()));
    }
  }

  // --- Pages: joint matrix -------------------------------------------------

  const DETAIL = 44;  // Blocks at least this wide show their cells.

  async function matrixPage(first, second) {
    const M = core.numVariables;
    const b = core.numBins;
    const information = floats(core.information);
    const floor = floats(core.floor);
    const marginal = floats(core.marginal);
    const cross = core.crossInformation && floats(core.crossInformation);
    let kind = "joint";
    const value = (a, c) => (kind === "cross" ? cross : information)[a * M + c];
    const excess = (a, c) => Math.max(value(a, c) - floor[a * M + c], 0);
    const top = () => {
      let most = 1e-9;
      for (let a = 0; a < M; a++) {
        for (let c = 0; c < M; c++) if (a !== c) most = Math.max(most,
          excess(a, c));
      }
      return most;
    };
    const canvas = h("canvas", { tabindex: "0", role: "application",
      "aria-label": "Joint matrix. Arrow keys move, plus and minus zoom, zero "
        + "fits, Enter opens the variable." });
    const coarse = document.createElement("canvas");
    coarse.width = coarse.height = M;
    let most;
    const paintCoarse = () => {
      most = top();
      const context = coarse.getContext("2d");
      const pixels = context.createImageData(M, M);
      const table = palette("sequential");
      const grey = isDark() ? [58, 62, 68] : [214, 211, 204];
      for (let a = 0; a < M; a++) {
        for (let c = 0; c < M; c++) {
          const level = Math.round(255 * Math.sqrt(clamp(excess(a, c) / most,
            0, 1)));
          const rgb = a === c && kind === "joint" ? grey
            : [...table.subarray(3 * level, 3 * level + 3)];
          pixels.data.set([...rgb, 255], 4 * (a * M + c));
        }
      }
      context.putImageData(pixels, 0, 0);
    };

    // Rows of blocks come when they are looked at; the oldest are dropped.
    const rows = new Map();
    const blocks = new Map();
    const needRow = (m) => {
      if (rows.has(m)) return rows.get(m).levels;
      const entry = { levels: null };
      rows.set(m, entry);
      if (rows.size > 40) {
        const oldest = rows.keys().next().value;
        rows.delete(oldest);
        forget(`joint_${oldest}`);
      }
      load(`joint_${m}`).then((raw) => inflate(raw.blocks)).then((buffer) => {
        entry.levels = new Uint8Array(buffer);
        view.ask();
      }).catch(() => { entry.levels = null; });
      return null;
    };
    /* Level of a cell: the matrix is symmetric, its upper half is stored. */
    const level = (a, c, d, e) => {
      if (a > c) return level(c, a, e, d);
      const levels = needRow(a);
      return levels ? levels[((c - a) * b + d) * b + e] : -1;
    };
    const block = (a, c) => {
      const key = `${a} ${c}`;
      if (blocks.has(key)) return blocks.get(key);
      if (!needRow(Math.min(a, c))) return null;
      const node = document.createElement("canvas");
      node.width = node.height = b;
      const context = node.getContext("2d");
      const pixels = context.createImageData(b, b);
      const table = palette("ratio");
      const data = pixels.data;
      for (let d = 0; d < b; d++) {
        for (let e = 0; e < b; e++) {
          const l = level(a, c, d, e);
          const i = 4 * (d * b + e);
          data[i] = table[3 * l];
          data[i + 1] = table[3 * l + 1];
          data[i + 2] = table[3 * l + 2];
          data[i + 3] = 255;
        }
      }
      context.putImageData(pixels, 0, 0);
      blocks.set(key, node);
      if (blocks.size > 600) blocks.delete(blocks.keys().next().value);
      return node;
    };

    const hasDetail = () => core.hasJointDetail && kind === "joint"
      && view.scale >= Math.max(DETAIL, 1.4 * view.fitScale);
    let cursor = [first ?? 0, second ?? Math.min(1, M - 1), 0, 0];
    let cursorShown = first !== undefined;
    const draw = () => {
      const [context, width, height] = canvasFor(canvas);
      context.fillStyle = token("--panel");
      context.fillRect(0, 0, width, height);
      context.imageSmoothingEnabled = false;
      const [x, y] = view.screen(0, 0);
      context.drawImage(coarse, x, y, M * view.scale, M * view.scale);
      if (hasDetail()) {
        const [left, up] = view.world(0, 0).map((v) => clamp(Math.floor(v), 0,
          M - 1));
        const [right, down] = view.world(width, height).map((v) =>
          clamp(Math.floor(v), 0, M - 1));
        context.fillStyle = token("--line");
        let budget = 24;  // Blocks painted per frame, to keep frames short.
        for (let a = up; a <= down; a++) {
          for (let c = left; c <= right; c++) {
            if (!blocks.has(`${a} ${c}`) && budget-- <= 0) {
              view.ask();
              continue;
            }
            const picture = block(a, c);
            if (!picture) continue;
            const [px, py] = view.screen(c, a);
            context.fillRect(px - 0.5, py - 0.5, view.scale, view.scale);
            context.drawImage(picture, px, py, view.scale - 1, view.scale - 1);
          }
        }
        drawLabels(context, up, down, left, right);
      }
      if (cursorShown) {
        const cell = hasDetail() && view.scale / b >= 5;
        const size = cell ? view.scale / b : view.scale;
        const [px, py] = view.screen(cursor[1] + (cell ? cursor[3] / b : 0),
          cursor[0] + (cell ? cursor[2] / b : 0));
        context.strokeStyle = isDark() ? "#fff" : "#000";
        context.lineWidth = 2;
        context.strokeRect(px - 1, py - 1, size + 2, size + 2);
      }
    };
    const drawLabels = (context, up, down, left, right) => {
      context.font = `12px ${token("--sans")}`;
      const tag = (text, px, py) => {
        const wide = context.measureText(text).width + 8;
        context.fillStyle = token("--panel");
        context.globalAlpha = 0.86;
        context.fillRect(px, py, wide, 18);
        context.globalAlpha = 1;
        context.fillStyle = token("--ink");
        context.fillText(text, px + 4, py + 13);
      };
      for (let c = left; c <= right; c++) tag(`v${c}`,
        view.screen(c, 0)[0] + 2, 2);
      for (let a = up; a <= down; a++) tag(`v${a}`, 2,
        view.screen(0, a)[1] + 2);
    };
    const view = new View(canvas, M, Math.max(24 * b, 900), draw);

    const describe = (a, c, d, e) => {
      const lines = [a === c && kind === "joint" ? `Variable ${a} with itself`
        : `Variables ${a} and ${c}`,
      `mutual information ${nats(value(a, c))}, floor `
        + `${nats(floor[a * M + c])}`];
      if (hasDetail()) {
        const l = level(a, c, d, e);
        if (l >= 0) {
          const independent = marginal[a * b + d] * marginal[c * b + e];
          const ratio = 2 ** ((l - 128) * core.ratioRange / 127);
          lines.push(l === 0 ? `bins ${d}, ${e}: P = 0` : `bins ${d}, ${e}: `
            + `P ≈ ${probability(ratio * independent)}, `
            + `${ratio.toPrecision(2)} × independent`);
        }
      }
      return lines;
    };
    const place = (x, y) => {
      const [worldX, worldY] = view.world(x, y);
      if (worldX < 0 || worldY < 0 || worldX >= M || worldY >= M) return null;
      return [Math.floor(worldY), Math.floor(worldX),
        Math.floor((worldY % 1) * b), Math.floor((worldX % 1) * b)];
    };
    const tipAt = (at, x, y) => {
      const [title, ...lines] = describe(...at);
      showTip([h("b", {}, title), ...lines.map((l) => h("div", {}, l))], x, y,
        canvas);
      return [title, ...lines].join(", ");
    };
    const hover = (event) => {
      const at = place(event.offsetX, event.offsetY);
      if (at) tipAt(at, event.clientX, event.clientY);
      else hideTip();
    };
    canvas.addEventListener("pointermove", hover);
    canvas.addEventListener("pointerleave", hideTip);
    canvas.addEventListener("blur", hideTip);
    canvas.addEventListener("click", (event) => {
      const at = place(event.offsetX, event.offsetY);
      if (!at || view.moved > 4) return;
      cursor = at;
      cursorShown = true;
      view.ask();
      hover(event);
    });
    canvas.addEventListener("dblclick", (event) => view.zoom(3, event.offsetX,
      event.offsetY));
    canvas.addEventListener("keydown", (event) => {
      if (viewKey(event, view)) return;
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1],
        ArrowRight: [0, 1] };
      if (event.key === "Enter") location.hash = `#/variable/${cursor[0]}`;
      if (!moves[event.key]) return;
      event.preventDefault();
      const cell = hasDetail() && view.scale / b >= 5;
      moves[event.key].forEach((delta, axis) => {
        if (!cell || event.shiftKey) {
          cursor[axis] = clamp(cursor[axis] + (cursorShown ? delta : 0), 0,
            M - 1);
          return;
        }
        let flat = cursor[axis] * b + cursor[axis + 2] + delta;
        flat = clamp(flat, 0, M * b - 1);
        cursor[axis] = Math.floor(flat / b);
        cursor[axis + 2] = flat % b;
      });
      cursorShown = true;
      const [px, py] = view.screen(cursor[1] + (cell ? cursor[3] / b : 0.5),
        cursor[0] + (cell ? cursor[2] / b : 0.5));
      if (px < 30 || py < 30 || px > view.width - 30 || py > view.height - 30) {
        view.centre(cursor[1] + cursor[3] / b, cursor[0] + cursor[2] / b,
          view.scale);
      }
      view.ask();
      const box = canvas.getBoundingClientRect();
      say(tipAt(cursor, box.left + clamp(px, 0, view.width),
        box.top + clamp(py, 0, view.height)));
    });

    const ramp = (which) => {
      const node = h("canvas", { "aria-hidden": "true" });
      node.width = 256;
      node.height = 1;
      const paint = () => {
        const context = node.getContext("2d");
        const pixels = context.createImageData(256, 1);
        const table = palette(which);
        for (let i = 0; i < 256; i++) pixels.data.set([table[3 * i],
          table[3 * i + 1], table[3 * i + 2], 255], 4 * i);
        context.putImageData(pixels, 0, 0);
      };
      paint();
      redraws.push(paint);
      return node;
    };
    const legendMost = h("span", {});
    const paint = () => {
      paintCoarse();
      blocks.clear();
      legendMost.textContent = nats(most);
      view.ask();
    };
    redraws.push(paint);
    afterShow = () => {
      paint();
      view.fit();
      if (first !== undefined && second !== undefined && first < M
          && second < M) {
        view.centre(second + 0.5, first + 0.5,
          Math.min(view.width, view.height) * 0.8);
      }
    };
    const pick = (label, start) => h("input", { type: "number", min: 0,
      max: M - 1, value: start, "aria-label": label, style: { width: "5rem" } });
    const pickA = pick("First variable", cursor[0]);
    const pickB = pick("Second variable", cursor[1]);
    return [
      h("h1", { tabindex: "-1" }, "Joint matrix"),
      h("p", { class: "soft" }, "Each square is a pair of variables; its "
        + "colour is their mutual information above the finite-sample floor. ",
      core.hasJointDetail ? "Zoom in to see every pair of bins: how much more "
        + "or less often they occur together than if they were independent."
        : "The cells of the blocks are in analysis.npz."),
      h("div", { class: "head" },
        h("form", { class: "controls", onsubmit: (event) => {
          event.preventDefault();
          const [a, c] = [pickA, pickB].map((input) => clamp(
            Math.round(+input.value) || 0, 0, M - 1));
          cursor = [a, c, 0, 0];
          cursorShown = true;
          view.centre(c + 0.5, a + 0.5, Math.min(view.width, view.height)
            * 0.8);
        } }, h("span", { class: "field" }, "Pair", pickA, "×", pickB),
        h("button", {}, "Go")),
        cross && h("div", { class: "controls" }, choice("Show", [["joint", "one view (joint)"],
          ["cross", "two views (cross-joint)"]], kind, (chosen) => {
          kind = chosen;
          paint();
        }, "matrix-kind"))),
      h("div", { class: "stage" }, canvas, view.buttons()),
      h("div", { class: "legend" },
        h("span", {}, "pairs: floor", ramp("sequential"), legendMost),
        core.hasJointDetail && h("span", {}, "bins: ",
          `1/${2 ** core.ratioRange} ×`, ramp("ratio"),
          `${2 ** core.ratioRange} × independent`)),
    ];
  }

  /* Zoom keys that the matrix and the map share. */
  function viewKey(event, view) {
    const act = { "+": () => view.zoom(1.5), "=": () => view.zoom(1.5),
      "-": () => view.zoom(1 / 1.5), 0: () => view.fit() }[event.key];
    if (!act || event.ctrlKey || event.metaKey) return false;
    event.preventDefault();
    act();
    return true;
  }

  // --- Pages: map ----------------------------------------------------------

  async function mapPage() {
    const [raw, all] = await Promise.all([load("map"), images()]);
    const slots = new Int32Array(await inflate(raw.slots));
    const points = new Uint16Array(await inflate(raw.points));
    const count = slots.length;
    const options = [["none", "nothing"],
      ...core.factors.map((f, i) => [`f${i}`, f.name]),
      ...(core.hasCodes ? range(core.numVariables).map((m) => [`v${m}`,
        `variable ${m}`]) : [])];
    let colouring = core.factors.length ? "f0" : options[0][0];
    const canvas = h("canvas", { tabindex: "0", role: "application",
      "aria-label": "Map of the embedding. Arrow keys move, plus and minus "
        + "zoom, zero fits." });
    const legend = h("div", { class: "legend" });
    const values = () => {
      const at = +colouring.slice(1);
      if (colouring === "none") return [() => 0, 1, () => ""];
      if (colouring[0] === "f") {
        return [(slot) => all.factors[at][slot], core.factors[at].values.length,
          (k) => core.factors[at].values[k]];
      }
      return [(slot) => all.codes[at * all.indices.length + slot],
        core.numBins, (k) => `bin ${k}`];
    };
    let groups;
    const group = () => {
      const [value, total, name] = values();
      const colours = range(total).map((k) => (total === 1 ? token("--accent")
        : category(k, total)));
      groups = range(total + 1).map(() => []);
      for (let i = 0; i < count; i++) {
        const k = value(slots[i]);
        groups[k < 0 ? total : k].push(i);
      }
      legend.replaceChildren(...(total === 1 ? [] : range(Math.min(total, 12))
        .map((k) => h("span", {}, h("span", { class: "swatch",
          style: { background: colours[k] } }), name(k)))),
      total > 12 ? h("span", {}, `and ${total - 12} more`) : "");
      groups.colours = [...colours, token("--soft")];
      view.ask();
    };
    const draw = () => {
      const [context, width, height] = canvasFor(canvas);
      context.fillStyle = token("--panel");
      context.fillRect(0, 0, width, height);
      const radius = clamp((count > 8000 ? 1.6 : 3.2)
        * Math.sqrt(view.scale / view.fitScale), 1.5, 9);
      context.globalAlpha = count > 5000 ? 0.65 : 0.85;
      groups.forEach((members, k) => {
        context.fillStyle = groups.colours[k];
        for (const i of members) {
          const x = (points[2 * i] / 65535 - view.left) * view.scale;
          const y = (1 - points[2 * i + 1] / 65535 - view.top) * view.scale;
          if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
          context.fillRect(x - radius / 2, y - radius / 2, radius, radius);
        }
      });
      context.globalAlpha = 1;
    };
    const view = new View(canvas, 1, 1e5, draw);
    const nearest = (x, y) => {
      let found = -1;
      let closest = 144;
      for (let i = 0; i < count; i++) {
        const px = (points[2 * i] / 65535 - view.left) * view.scale - x;
        const py = (1 - points[2 * i + 1] / 65535 - view.top) * view.scale - y;
        const apart = px * px + py * py;
        if (apart < closest) [closest, found] = [apart, i];
      }
      return found;
    };
    canvas.addEventListener("pointermove", (event) => {
      const i = nearest(event.offsetX, event.offsetY);
      if (i < 0) hideTip();
      else showTip(imageTip(all, slots[i], {}), event.clientX, event.clientY,
        canvas);
    });
    canvas.addEventListener("pointerleave", hideTip);
    canvas.addEventListener("click", (event) => {
      const i = nearest(event.offsetX, event.offsetY);
      if (i >= 0 && view.moved <= 4) {
        location.hash = `#/image/${all.indices[slots[i]]}`;
      }
    });
    canvas.addEventListener("keydown", (event) => {
      if (viewKey(event, view)) return;
      const moves = { ArrowUp: [0, 60], ArrowDown: [0, -60],
        ArrowLeft: [60, 0], ArrowRight: [-60, 0] };
      if (!moves[event.key]) return;
      event.preventDefault();
      view.pan(...moves[event.key]);
    });
    redraws.push(group);
    afterShow = () => { view.fit(); group(); };
    const [x, y] = raw.explained;
    return [
      h("div", { class: "head" },
        h("h1", { tabindex: "-1" }, "Map of the embedding"),
        h("div", { class: "controls" }, choice("Colour by", options, colouring,
          (chosen) => { colouring = chosen; group(); }, "colour-by"))),
      h("p", { class: "soft" }, `The first two principal components of the `
        + `features hold ${percent(x)} and ${percent(y)} of their variance; `
        + "each axis is scaled to fill the square. "
        + `${number(count)} images. Choose a point to open its image.`),
      h("div", { class: "stage" }, canvas, view.buttons()), legend,
    ];
  }

  // --- Routing -------------------------------------------------------------

  let redraws = [];
  let cleanups = [];
  let afterShow = null;
  let refill = () => {};
  let updateSharing = () => {};
  let ticket = 0;

  function tabs() {
    const result = [["overview", "Overview"]];
    if (core.hasCodes) result.push(["variables", "Variables"]);
    result.push(["images", "Images"]);
    if (core.information) result.push(["matrix", "Matrix"]);
    if (core.hasMap) result.push(["map", "Map"]);
    return result;
  }

  function missing(what, why = "") {
    return [h("h1", { tabindex: "-1" }, "Not here"),
      h("p", {}, `${what} is not in this explorer. ${why}`),
      h("p", {}, h("a", { href: "#/overview" }, "Back to the overview"))];
  }

  async function route() {
    const mine = ++ticket;
    hideTip();
    const [path, query] = location.hash.slice(2).split("?");
    const [page = "", ...rest] = path.split("/");
    const integer = (text) => (/^\d+$/.test(text || "") ? +text : undefined);
    const [first, second] = rest.map(integer);
    cleanups.forEach((clean) => clean());
    redraws = [];
    cleanups = [];
    afterShow = null;
    refill = () => {};
    let nodes;
    try {
      const known = tabs().some(([key]) => key === page);
      if (page === "variable" && core.hasCodes) {
        nodes = await variablePage(first, second);
      } else if (page === "image") nodes = await imagePage(first);
      else if (page && !known) nodes = missing(`“${page}”`);
      else if (page === "variables") nodes = variablesPage();
      else if (page === "images") {
        nodes = await imagesPage(new URLSearchParams(query || ""));
      } else if (page === "matrix") nodes = await matrixPage(first, second);
      else if (page === "map") nodes = await mapPage();
      else nodes = overviewPage();
    } catch (error) {
      nodes = [h("h1", { tabindex: "-1" }, "Could not load this page"),
        h("p", {}, error.message)];
    }
    if (mine !== ticket) return;  // Another page was asked for meanwhile.
    const main = $("main");
    main.replaceChildren(...nodes.flat().filter(Boolean));
    const heading = main.querySelector("h1");
    document.title = `${heading.textContent} · ${core.title}`;
    const current = { variable: "variables", image: "images" }[page] || page
      || "overview";
    document.querySelectorAll("#tabs a").forEach((link) => {
      if (link.dataset.page === current) {
        link.setAttribute("aria-current", "page");
      } else link.removeAttribute("aria-current");
    });
    scrollTo(0, 0);
    if (routed) heading.focus({ preventScroll: true });
    routed = true;
    if (afterShow) afterShow();
    main.dataset.ready = location.hash || "#/overview";
  }

  let routed = false;

  // --- Theme and keyboard --------------------------------------------------

  const THEMES = ["auto", "light", "dark"];
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  let theme = "auto";
  try {
    theme = localStorage.getItem("imsvd-theme") || "auto";
  } catch { /* Some browsers forbid storage for files. */ }

  function applyTheme() {
    if (!THEMES.includes(theme)) theme = "auto";
    const dark = theme === "dark" || (theme === "auto" && prefersDark.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    const name = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
    $("theme").textContent = name;
    $("theme").setAttribute("aria-label", `Theme: ${name}`);
    redraws.forEach((draw) => draw());
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
    else if (event.key === "o") {
      const select = $("overlay");
      if (!select) return;
      select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
      select.dispatchEvent(new Event("change"));
      say(`Overlay: ${select.selectedOptions[0].textContent}`);
    } else if (/^[1-5]$/.test(event.key)) {
      const tab = tabs()[event.key - 1];
      if (tab) location.hash = `#/${tab[0]}`;
    }
  }

  function find(text) {
    const wanted = text.trim().match(/^(?:v|variable)\s*(\d+)$/i);
    if (wanted && core.hasCodes) location.hash = `#/variable/${+wanted[1]}`;
    else location.hash = `#/images?q=${encodeURIComponent(text.trim())}`;
  }

  function start(value) {
    core = value;
    $("tabs").replaceChildren(...tabs().map(([page, label]) =>
      h("a", { href: `#/${page}`, "data-page": page }, label)));
    $("find-form").addEventListener("submit", (event) => {
      event.preventDefault();
      find($("find").value);
    });
    $("theme").addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      try {
        localStorage.setItem("imsvd-theme", theme);
      } catch { /* Kept for this page only. */ }
      applyTheme();
    });
    $("keys").addEventListener("click", () => $("help").showModal());
    prefersDark.addEventListener("change", applyTheme);
    addEventListener("hashchange", route);
    addEventListener("keydown", keyboard);
    addEventListener("scroll", () => { if (tipOwner) hideTip(); },
      { passive: true });
    route();
  }

  applyTheme();
  return { receive };
})();
