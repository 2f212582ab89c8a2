"use strict";
// Draws the map, and shows the image below the pointer or the keyboard's cursor and the neighbours of the one that is chosen.

const map = (() => {
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const numbers = (text) => new Uint16Array(bytes(text));
  return {
    ...data,
    places: numbers(data.places),
    labels: numbers(data.labels),
    neighbours: numbers(data.neighbours),
    cosines: data.cosines === null ? null : new Uint8Array(bytes(data.cosines)),
  };
})();
const NONE = 65535; // a place without a neighbour, an image of no class
const REACH = 12; // pixels between the pointer and a point that it is at
const section = document.getElementById("map");
const [canvas, tip, panel, said] = ["canvas", ".map-tip", ".map-panel", ".map-said"].map((s) => section.querySelector(s));
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const view = { x: 0.5, y: 0.5, scale: 1 };
const state = { hovered: -1, cursor: -1, chosen: -1, colouring: "class", words: [], printing: false };

const nameOf = (i) => (map.labels[i] === NONE ? "no class" : map.classes[map.labels[i]]);
const neighboursOf = (i) => [...map.neighbours.subarray(i * map.k, (i + 1) * map.k)].filter((j) => j !== NONE);
const isRight = (i, j) => map.labels[i] !== NONE && map.labels[i] === map.labels[j];

function size() {
  return [canvas.clientWidth, canvas.clientHeight];
}

// Place of a point in the canvas, in CSS pixels.
function placeOf(i) {
  const [width, height] = size();
  const unit = Math.min(width, height) * 0.94 * view.scale;
  return [
    width / 2 + (map.places[2 * i] / 65535 - view.x) * unit,
    height / 2 + (map.places[2 * i + 1] / 65535 - view.y) * unit,
  ];
}

function matches(i) {
  const name = nameOf(i).toLowerCase();
  return state.words.every((word) => name.includes(word));
}

function colourOf(i, style) {
  if (state.colouring === "neighbour") {
    const first = map.neighbours[i * map.k];
    return style(first !== NONE && isRight(i, first) ? "--right" : "--wrong");
  }
  const label = map.labels[i];
  if (label === NONE) return style("--muted");
  const light = (dark.matches && !state.printing ? 52 : 36) + 20 * map.tones[label];
  return `hsl(${map.hues[label]} ${45 + 30 * map.tones[label]}% ${light}%)`;
}

function draw() {
  const [width, height] = size();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const computed = getComputedStyle(document.documentElement);
  const style = (name) => (state.printing && name === "--ink" ? "#1b1f24" : computed.getPropertyValue(name).trim());
  const radius = Math.min(5, Math.max(1.7, 130 / Math.sqrt(map.points)) * Math.sqrt(view.scale));
  const circle = (i, r) => {
    context.beginPath();
    context.arc(...placeOf(i), r, 0, 7);
  };
  const found = [];
  for (let i = 0; i < map.points; i++) {
    if (state.words.length && matches(i)) {
      found.push(i);
      continue;
    }
    context.globalAlpha = state.words.length ? 0.18 : 0.8;
    context.fillStyle = state.words.length ? style("--muted") : colourOf(i, style);
    circle(i, radius);
    context.fill();
  }
  context.globalAlpha = 1;
  for (const i of found) {
    context.fillStyle = colourOf(i, style);
    circle(i, radius + 1.5);
    context.fill();
  }
  if (state.chosen >= 0) drawChosen(context, style, circle, radius);
  for (const i of new Set([state.hovered, state.cursor])) {
    if (i < 0) continue;
    context.strokeStyle = style("--ink");
    context.lineWidth = 2;
    circle(i, radius + 4);
    context.stroke();
  }
}

// Lines from the chosen point to its neighbours, green to those of its class and red to the others.
function drawChosen(context, style, circle, radius) {
  for (const j of neighboursOf(state.chosen)) {
    context.strokeStyle = context.fillStyle = style(isRight(state.chosen, j) ? "--right" : "--wrong");
    context.lineWidth = 1.5;
    context.beginPath();
    context.moveTo(...placeOf(state.chosen));
    context.lineTo(...placeOf(j));
    context.stroke();
    circle(j, radius + 2);
    context.fill();
  }
  context.fillStyle = style("--ink");
  circle(state.chosen, radius + 3);
  context.fill();
}

function tile(i) {
  const element = document.createElement("span");
  element.className = "tile";
  const last = Math.max(1, map.columns - 1);
  const lastRow = Math.max(1, map.rows - 1);
  const [column, row] = [i % map.columns, Math.floor(i / map.columns)];
  element.style.backgroundPosition = `${(100 * column) / last}% ${(100 * row) / lastRow}%`;
  return element;
}

function text(tag, content, name = "") {
  const element = document.createElement(tag);
  element.textContent = content;
  if (name) element.className = name;
  return element;
}

const fileOf = (i) => (map.files ? map.files[i] : `image ${map.ids[i]}`);

// The tip stays within the map, beside its point.
function showTip(i) {
  tip.hidden = i < 0;
  if (i < 0) return;
  tip.replaceChildren(tile(i), text("strong", nameOf(i)), text("small", fileOf(i)));
  const [x, y] = placeOf(i);
  const [width, height] = size();
  tip.style.left = `${Math.max(0, x + 14 + tip.offsetWidth > width ? x - 14 - tip.offsetWidth : x + 14)}px`;
  tip.style.top = `${Math.max(0, Math.min(y - 20, height - tip.offsetHeight))}px`;
}

function choose(i) {
  state.chosen = i;
  if (i >= 0) state.cursor = i;
  panel.replaceChildren();
  panel.classList.toggle("empty", i < 0);
  if (i < 0) {
    panel.append(text("p", panel.dataset.hint, "note"));
  } else {
    const head = document.createElement("div");
    head.className = "map-chosen";
    const words = document.createElement("div");
    words.append(text("strong", nameOf(i)), text("small", fileOf(i)));
    head.append(tile(i), words);
    const list = document.createElement("ol");
    neighboursOf(i).forEach((j, rank) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = isRight(i, j) ? "right" : "wrong";
      button.dataset.point = j;
      const cosine = map.cosines === null ? "" : `cosine ${(map.cosines[i * map.k + rank] / 100 - 1).toFixed(2)}`;
      const told = document.createElement("span");
      told.append(text("b", `${isRight(i, j) ? "✓" : "✗"} ${nameOf(j)}`), text("small", cosine));
      button.append(tile(j), told);
      button.addEventListener("click", () => {
        choose(j);
        panel.querySelector("button")?.focus({ preventScroll: true });
      });
      for (const event of ["focus", "pointerenter"]) button.addEventListener(event, () => hover(j));
      const item = document.createElement("li");
      item.append(button);
      list.append(item);
    });
    panel.append(head, text("p", `Its nearest ${map.what}, nearest first:`, "note"), list);
  }
  hover(-1);
}

function hover(i) {
  state.hovered = i;
  showTip(i);
  draw();
}

function pointAt(x, y, reach = REACH) {
  let [best, nearest] = [-1, reach * reach];
  for (let i = 0; i < map.points; i++) {
    const [px, py] = placeOf(i);
    const distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance < nearest) [best, nearest] = [i, distance];
  }
  return best;
}

// The nearest point that lies in a direction, within 45 degrees of it.
function pointBeside(from, dx, dy) {
  const [x, y] = placeOf(from);
  let [best, nearest] = [-1, Infinity];
  for (let i = 0; i < map.points; i++) {
    const [px, py] = placeOf(i);
    const along = (px - x) * dx + (py - y) * dy;
    const across = Math.abs((px - x) * dy - (py - y) * dx);
    const distance = along * along + across * across;
    if (along > 0 && across <= along && distance < nearest) [best, nearest] = [i, distance];
  }
  return best;
}

function moveCursor(i) {
  if (i < 0) return;
  state.cursor = i;
  const [x, y] = placeOf(i);
  const [width, height] = size();
  if (x < 0 || y < 0 || x > width || y > height) {
    view.x = map.places[2 * i] / 65535;
    view.y = map.places[2 * i + 1] / 65535;
  }
  hover(i);
  said.textContent = `${nameOf(i)}, ${fileOf(i)}`;
}

// Zooms about a place of the canvas.
function zoom(factor, x = size()[0] / 2, y = size()[1] / 2) {
  const [width, height] = size();
  const scale = Math.min(40, Math.max(1, view.scale * factor));
  const unit = Math.min(width, height) * 0.94;
  const shift = 1 / (unit * view.scale) - 1 / (unit * scale);
  view.x += (x - width / 2) * shift;
  view.y += (y - height / 2) * shift;
  view.scale = scale;
  if (scale === 1) view.x = view.y = 0.5;
  canvas.style.touchAction = scale === 1 ? "manipulation" : "none"; // a finger moves the page, or what is zoomed
  hover(-1);
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in ARROWS) moveCursor(pointBeside(state.cursor, ...ARROWS[event.key]));
  else if (event.key === "Enter" || event.key === " ") choose(state.cursor);
  else if (event.key === "Escape") choose(-1);
  else if (event.key === "+" || event.key === "=") zoom(1.5);
  else if (event.key === "-") zoom(1 / 1.5);
  else if (event.key === "0") zoom(0);
  else return;
  event.preventDefault();
}

let drag = null; // where the pointer went down, and whether it has moved since

canvas.addEventListener("pointerdown", (event) => {
  drag = { x: event.offsetX, y: event.offsetY, moved: false };
});
canvas.addEventListener("pointermove", (event) => {
  const [x, y] = [event.offsetX, event.offsetY];
  if (drag && view.scale > 1 && (drag.moved || Math.hypot(x - drag.x, y - drag.y) > 4)) {
    const unit = Math.min(...size()) * 0.94 * view.scale;
    view.x -= (x - drag.x) / unit;
    view.y -= (y - drag.y) / unit;
    drag = { x, y, moved: true };
    hover(-1);
    return;
  }
  const i = pointAt(x, y);
  if (i !== state.hovered) hover(i);
});
canvas.addEventListener("pointerup", (event) => {
  if (drag && !drag.moved) choose(pointAt(event.offsetX, event.offsetY, event.pointerType === "touch" ? 2 * REACH : REACH));
  drag = null;
});
canvas.addEventListener("pointerleave", () => {
  drag = null;
  hover(-1);
});
canvas.addEventListener("wheel", (event) => {
  if (document.activeElement !== canvas && !event.ctrlKey) return; // else the page scrolls
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.offsetX, event.offsetY);
}, { passive: false });
canvas.addEventListener("keydown", onKey);
canvas.addEventListener("focus", () => {
  if (canvas.matches(":focus-visible")) moveCursor(state.cursor < 0 ? pointAt(...size().map((s) => s / 2), Infinity) : state.cursor);
});
canvas.addEventListener("blur", () => hover(-1));

for (const button of section.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => zoom(Number(button.dataset.zoom)));
}
for (const input of section.querySelectorAll("[name=colouring]")) {
  input.addEventListener("change", () => {
    state.colouring = input.value;
    draw();
  });
}
section.querySelector("[type=search]").addEventListener("input", (event) => {
  state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = state.words.length ? [...Array(map.points).keys()].filter(matches).length : 0;
  section.querySelector(".map-count").textContent = state.words.length ? `${shown.toLocaleString("en")} found` : "";
  draw();
});
for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
  window.addEventListener(event, () => {
    state.printing = printing;
    hover(-1);
  });
}
dark.addEventListener("change", draw);
new ResizeObserver(draw).observe(canvas);
section.classList.add("runs");
choose(-1);
