"use strict";
const SVG = "http://www.w3.org/2000/svg";
const main = document.querySelector("main");

function make(parent, tag, attributes = {}, text = null) {
  const isDrawn = parent.namespaceURI === SVG || tag === "svg";
  const node = isDrawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

// Of a group of things of which one can be selected, one is in the order of tabs; arrows move on.
function selectable(items, detail, show) {
  let at = 0;
  function select(index, isFocused) {
    items[at].node.setAttribute("tabindex", "-1");
    for (const item of items) item.node.setAttribute("aria-pressed", "false");
    at = index;
    items[at].node.setAttribute("tabindex", "0");
    items[at].node.setAttribute("aria-pressed", "true");
    if (isFocused) items[at].node.focus();
    detail.replaceChildren();
    show(items[at], detail);
    if (items[at].anchor) history.replaceState(null, "", "#" + encodeURIComponent(items[at].anchor));
  }
  items.forEach((item, index) => {
    item.node.setAttribute("tabindex", index ? "-1" : "0");
    item.node.setAttribute("aria-pressed", "false");
    item.node.addEventListener("click", () => select(index, false));
    item.node.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        select(index, false);
      } else if (moves[event.key]) {
        event.preventDefault();
        const next = neighbour(items, index, ...moves[event.key]);
        if (next !== null) select(next, true);
      }
    });
  });
  const wanted = decodeURIComponent(location.hash.slice(1));
  const index = items.findIndex((item) => item.anchor && item.anchor === wanted);
  if (index >= 0) select(index, true);
}

function neighbour(items, index, down, across) {
  const here = items[index];
  let best = null;
  items.forEach((item, other) => {
    if (item.row === undefined) {
      if (other === index + down + across) best = other;
      return;
    }
    const ahead = down ? (item.row - here.row) * down : (item.column - here.column) * across;
    const aside = down ? item.column - here.column : item.row - here.row;
    if (aside === 0 && ahead > 0 && (best === null || ahead < distance(items[best]))) best = other;
  });
  return best;
  function distance(item) {
    return down ? (item.row - here.row) * down : (item.column - here.column) * across;
  }
}

function panel(section) {
  return make(section, "div", { class: "detail", role: "status", "aria-live": "polite" },
    "Nothing is selected.");
}

function grid(section, data) {
  const items = [];
  const cell = (parent, [glyph, name, text, strip, template], row, column) => {
    const style = data.styles[glyph];
    const label = name + ": " + data.legend[glyph];
    const node = make(parent, "button",
      { class: "cell " + style, type: "button", "aria-label": label, title: label }, glyph);
    items.push({ node, row, column, anchor: name, text, strip, template, name });
  };
  if (data.outside.length) {
    const list = make(section, "ul", { class: "outside" });
    data.outside.forEach(([head, value], column) => {
      const entry = make(list, "li");
      cell(entry, value, -1, column);
      make(entry, "span", {}, head);
    });
  }
  if (data.rows.length) {
    const table = make(make(section, "div", { class: "wide" }), "table",
      { class: "grid", "aria-label": data.title });
    const head = make(make(table, "thead"), "tr");
    make(head, "th", { class: "corner", scope: "col" }, "layer");
    for (const column of data.columns) make(head, "th", { scope: "col" }, column);
    const body = make(table, "tbody");
    data.rows.forEach(([name, cells], row) => {
      const line = make(body, "tr");
      make(line, "th", { scope: "row" }, name);
      cells.forEach((value, column) => {
        const place = make(line, "td");
        if (value) cell(place, value, row, column);
      });
    });
  }
  const legend = make(section, "ul", { class: "legend", "aria-label": "Legend" });
  for (const [glyph, words] of Object.entries(data.legend)) {
    if (!items.some((item) => item.node.textContent === glyph || (item.strip || "").includes(glyph)))
      continue;
    const entry = make(legend, "li");
    make(entry, "span", { class: "cell " + data.styles[glyph], "aria-hidden": "true" }, glyph);
    make(entry, "span", {}, words);
  }
  selectable(items, panel(section), (item, detail) => {
    make(detail, "div", {}, item.text);
    if (!item.strip) return;
    const strip = make(detail, "div", { class: "strip" });
    [...item.strip].forEach((glyph, number) => {
      if (glyph === " ") return;
      const title = item.template.replace("#", number) + ": " + data.legend[glyph];
      make(strip, "span", { class: data.styles[glyph], title }, glyph);
    });
  });
}

function treemap(section, data) {
  const picture = make(section, "svg",
    { viewBox: "0 0 " + data.width + " " + data.height, role: "group", "aria-label": data.title });
  const items = data.shapes.map(([x, y, width, height, style, name, text, parts], index) => {
    const node = make(picture, "rect", { x, y, width, height, class: "shape", fill: style,
      role: "button", "aria-label": text.replaceAll("\n", ", ") });
    make(node, "title", {}, text);
    const isWide = width >= height;
    for (let part = 1; part < parts && parts <= 400; part += 1) {
      const at = (isWide ? x + width * part / parts : y + height * part / parts).toFixed(1);
      make(picture, "line", { x1: isWide ? at : x, x2: isWide ? at : x + width, y1: isWide ? y : at,
        y2: isWide ? y + height : at, stroke: "var(--paper)", "stroke-width": 0.4,
        "pointer-events": "none" });
    }
    const words = [name, name.slice(name.lastIndexOf("N.") + 1).replace(/^\./, "")];
    const shown = words.find((word) => width > word.length * 7.4 + 8);
    if (shown && height > 18) {
      const chip = make(picture, "text", { x: x + 5, y: y + 15, "paint-order": "stroke",
        stroke: data.halos[index], "stroke-width": 3, fill: data.inks[index] }, shown);
      chip.setAttribute("aria-hidden", "true");
    }
    return { node, text, anchor: null };
  });
  selectable(items, panel(section), (item, detail) => make(detail, "div", {}, item.text));
}

function boxes(section, data) {
  const area = make(section, "div", { class: "boxes" });
  const items = [];
  for (const [name, width, height, shapes] of data.tensors) {
    const figure = make(area, "figure");
    make(figure, "figcaption", {}, name);
    const picture = make(figure, "svg", { viewBox: "0 0 " + width + " " + height,
      role: "group", "aria-label": name, width, height });
    for (const [x, y, w, h, file, text] of shapes) {
      const [fill, ink, label] = data.files[file];
      const node = make(picture, "rect", { x, y, width: w, height: h, fill, class: "shape",
        role: "button", "aria-label": text });
      make(node, "title", {}, text);
      if (h > 13 && w > label.length * 8)
        make(picture, "text", { x: x + 3, y: y + 12, fill: ink, "aria-hidden": "true" }, label);
      items.push({ node, text });
    }
  }
  selectable(items, panel(section), (item, detail) => make(detail, "div", {}, item.text));
}

function bars(section, data) {
  const height = 160, width = 640, step = width / data.counts.length;
  const most = Math.max(1, ...data.counts);
  const picture = make(section, "svg", { viewBox: "0 0 " + width + " " + (height + 20), role: "img",
    "aria-label": data.summary, width });
  data.counts.forEach((count, index) => {
    // Square roots: the tails of weights would not be seen otherwise.
    const tall = height * Math.sqrt(count / most);
    const bar = make(picture, "rect", { x: (index * step).toFixed(2), y: (height - tall).toFixed(2),
      width: (step - 0.5).toFixed(2), height: tall.toFixed(2), fill: "#31688e" });
    make(bar, "title", {}, data.labels[index] + ": " + count.toLocaleString("en"));
  });
  make(picture, "line", { x1: 0, x2: width, y1: height, y2: height, stroke: "var(--ink)" });
  make(picture, "text", { x: 0, y: height + 15, fill: "var(--ink)" }, data.low);
  make(picture, "text", { x: width, y: height + 15, fill: "var(--ink)", "text-anchor": "end" },
    data.high);
  make(section, "div", { class: "detail" }, data.summary);
}

function list(section, data) {
  const table = make(make(section, "div", { class: "wide" }), "table", { class: "list" });
  const head = make(make(table, "thead"), "tr");
  for (const name of data.columns) make(head, "th", { scope: "col" }, name);
  const body = make(table, "tbody");
  for (const row of data.rows) {
    const line = make(body, "tr");
    row.forEach((value, index) => {
      const isNumber = index > 0 && data.numbers.includes(index);
      make(line, "td", { class: isNumber ? "number" : "key" }, value);
    });
  }
}

const KINDS = { grid, treemap, boxes, bars, list };
for (const data of JSON.parse(document.getElementById("data").textContent)) {
  const section = make(main, "section", { "aria-label": data.title });
  make(section, "h2", {}, data.title);
  if (data.hint) make(section, "p", { class: "hint" }, data.hint);
  KINDS[data.kind](section, data);
}
