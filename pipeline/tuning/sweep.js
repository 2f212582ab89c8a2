"use strict";
// Sorts and filters tables, and draws the charts with plotly when they come into view.

const data = JSON.parse(document.getElementById("charts").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function sortBy(button) {
  const header = button.closest("th");
  const table = header.closest("table");
  const column = [...header.parentNode.children].indexOf(header);
  const ascending = header.getAttribute("aria-sort") === "descending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = table.tBodies[0];
  const keyOf = (row) => row.children[column].dataset.value ?? row.children[column].textContent.trim();
  const compare = (a, b) => {
    const [x, y] = [keyOf(a), keyOf(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what has no value comes last, either way
    const numeric = x !== "" && y !== "" && isFinite(x) && isFinite(y);
    const order = numeric ? x - y : x.localeCompare(y);
    return ascending ? order : -order;
  };
  body.append(...[...body.rows].sort(compare));
}

function filterRows(input) {
  const words = input.value.toLowerCase().split(/\s+/);
  let shown = 0;
  for (const row of document.getElementById(input.dataset.table).tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  input.nextElementSibling.textContent = `${shown} shown`;
}

// Lines of trials as one trace with gaps between them; the text of each point is its trial's label.
function expanded(trace) {
  const { lines, trials, ...rest } = trace;
  if (trials) return { ...rest, text: trials.map((trial) => data.labels[trial]) };
  if (!lines) return rest;
  const [x, y, text] = [[], [], []];
  for (const [trial, xs, ys] of lines) {
    x.push(...xs, null);
    y.push(...ys, null);
    text.push(...xs.map(() => data.labels[trial]), "");
  }
  return { ...rest, x, y, text };
}

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--muted"), automargin: true };
  return {
    ...layout,
    autosize: true,
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { color: colour("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { align: "left", bgcolor: colour("--panel"), bordercolor: colour("--muted"), font: { color: colour("--ink") } },
    margin: { l: 56, r: 16, t: 16, b: 48, ...layout.margin },
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
    annotations: (layout.annotations || []).map((mark) => ({ ...mark, bgcolor: colour("--page"), opacity: 0.85, borderpad: 0 })),
    shapes: (layout.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: colour("--muted") } })),
  };
}

// The line of the trial below the pointer, drawn over the others; plotly would draw the whole chart again for it.
function highlight(element, figure, point) {
  element.querySelector(".over")?.remove();
  const line = figure.data[point?.curveNumber]?.lines?.[lineOf(figure.data[point.curveNumber], point.pointNumber)];
  if (!line) return;
  const { xaxis, yaxis } = point;
  const over = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  over.setAttribute("class", "over");
  over.style.cssText = `left:${xaxis._offset}px; top:${yaxis._offset}px; width:${xaxis._length}px; height:${yaxis._length}px`;
  const path = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  path.setAttribute("points", line[1].map((x, i) => `${xaxis.d2p(x)},${yaxis.d2p(line[2][i])}`).join(" "));
  over.append(path);
  element.querySelector(".hoverlayer").closest("svg").before(over); // below the label
}

function lineOf(trace, point) {
  let start = 0;
  return (trace.lines || []).findIndex((line) => point < (start += line[1].length + 1));
}

function draw(element) {
  const figure = data.figures[element.id];
  const hasLines = figure.data.some((trace) => trace.lines);
  const config = {
    displayModeBar: figure.layout.height > 300 ? "hover" : false,
    displaylogo: false,
    responsive: true,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  };
  Plotly.react(element, figure.data.map(expanded), themed(figure.layout), config);
  if (hasLines && !element.dataset.drawn) {
    element.on("plotly_hover", (event) => highlight(element, figure, event.points[0]));
    element.on("plotly_unhover", () => highlight(element, figure, null));
    element.on("plotly_relayout", () => highlight(element, figure, null));
  }
  element.dataset.drawn = "yes";
}

function drawAll() {
  for (const element of document.querySelectorAll(".chart-area")) if (element.dataset.drawn || element.offsetParent) draw(element);
}

for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sortBy(button));
for (const input of document.querySelectorAll("input[data-table]")) input.addEventListener("input", () => filterRows(input));

const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "400px" },
);
for (const element of document.querySelectorAll(".chart-area")) seen.observe(element);
const redraw = () => document.querySelectorAll(".chart-area[data-drawn]").forEach(draw);
dark.addEventListener("change", redraw);
window.addEventListener("beforeprint", drawAll);
