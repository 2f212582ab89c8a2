"use strict";
// Everything that comes from the index or from a file is set as text or as a blob, never as markup.
const byId = (id) => document.getElementById(id);
const status = byId("status");
let blobs = [];  // addresses of the pictures that are shown
let shown = 0;  // the newest search; answers to earlier ones are dropped
let current = null;

const headers = () => {
  const token = byId("token").value || sessionStorage.getItem("token") || "";
  return token ? { Authorization: `Bearer ${token}` } : {};
};

const ask = async (path, options = {}) => {
  const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (answer.status === 401) {
    byId("token-field").hidden = false;
    byId("token").focus();
    throw new Error("This service needs its token.");
  }
  if (!answer.ok) {
    const text = await answer.text();
    let message = `${answer.status} ${answer.statusText}`;
    try { message = JSON.parse(text).error || message; } catch { /* an answer that is not the service's own */ }
    throw new Error(message);
  }
  return answer;
};

const picture = (blob) => {
  const url = URL.createObjectURL(blob);
  blobs.push(url);
  return url;
};

const neighbour = (hit) => {
  const item = document.createElement("li");
  const figure = document.createElement("figure");
  figure.title = hit.path;
  const image = document.createElement("img");
  image.alt = `${hit.shown_name ?? "no class"}, ${hit.path}`;
  const caption = document.createElement("figcaption");
  for (const [kind, text] of [["class", hit.shown_name ?? "no class"], ["similarity", hit.similarity.toFixed(3)]]) {
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = text;
    caption.append(span);
  }
  figure.append(image, caption);
  item.append(figure);
  return [item, image];
};

const loadThumbnail = async (image, id) => {
  try {
    image.src = picture(await (await ask(`thumbnail/${id}`)).blob());
  } catch {
    image.classList.add("none");  // the index keeps no thumbnail of it; its text stays
  }
};

const search = async (file) => {
  const number = ++shown;
  current = file;
  status.textContent = "Searching …";
  document.body.setAttribute("aria-busy", "true");
  try {
    const k = byId("k").value;
    const answer = await ask(`search?k=${k}`, { method: "POST", body: file, headers: { "Content-Type": file.type || "application/octet-stream" } });
    const found = await answer.json();
    if (number !== shown) return;
    if (byId("token").value) sessionStorage.setItem("token", byId("token").value);
    blobs.forEach((url) => URL.revokeObjectURL(url));
    blobs = [];
    byId("query").src = picture(file);
    byId("query-name").textContent = file.name || "pasted image";
    const list = byId("neighbours");
    list.replaceChildren();
    const loading = found.neighbours.map((hit) => {
      const [item, image] = neighbour(hit);
      list.append(item);
      return loadThumbnail(image, hit.id);
    });
    byId("results").hidden = false;
    await Promise.all(loading);
    if (number !== shown) return;
    status.textContent = found.neighbours.length
      ? `${found.neighbours.length} neighbours in ${Math.round(found.milliseconds)} ms` : "The index is empty.";
    byId("heading").focus();
  } catch (error) {
    if (number !== shown) return;
    byId("results").hidden = true;
    status.textContent = error instanceof TypeError ? "The service cannot be reached." : error.message;
  } finally {
    if (number === shown) document.body.removeAttribute("aria-busy");
  }
};

const firstImage = (files) => {
  if (files && files.length) search(files[0]);
};

const about = async () => {
  try {
    const info = await (await ask("info")).json();
    const measure = info.distance === "cosine" ? "cosine similarity" : "minus the Euclidean distance";
    const engine = info.engine === "exact" ? "exact search" : `${info.engine}, recall ${info.recall.toFixed(3)}`;
    byId("about").textContent = `${info.images.toLocaleString("en")} images, model ${info.model}; ${measure}, ${engine}`;
    status.textContent = "";
  } catch (error) {
    status.textContent = error.message;
  }
};

byId("form").addEventListener("submit", (event) => event.preventDefault());
byId("file").addEventListener("change", (event) => firstImage(event.target.files));
byId("k").addEventListener("change", () => { if (current) search(current); });
byId("token").addEventListener("change", () => { if (current) search(current); else about(); });
document.addEventListener("paste", (event) => firstImage(event.clipboardData?.files));
document.addEventListener("dragover", (event) => { event.preventDefault(); byId("drop").classList.add("over"); });
document.addEventListener("dragleave", () => byId("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  firstImage(event.dataTransfer.files);
});
about();
