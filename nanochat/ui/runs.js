// The runs page: curves, samples and evaluations of a run, read again every few seconds while it trains.

import { get } from "./api.js";
import { element } from "./render.js";
import { settings } from "./store.js";

const PERIOD_MS = 3000;
const LIVE_S = 60;  // a run that wrote within so many seconds is training
const [choice, live, main] = ["run", "live", "stages"].map((id) => document.getElementById(id));
if (settings.theme) document.documentElement.dataset.theme = settings.theme;

const number = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4))));

function drawCurve({ title, points }) {
  const svgTag = (tag, attributes, ...children) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const place = ([x, y]) => `${(300 * (x - x0)) / (x1 - x0 || 1)},${100 - (100 * (y - y0)) / (y1 - y0 || 1)}`;
  const line = svgTag("polyline", { points: points.length > 1 ? points.map(place).join(" ") : "150,50 150,50" });
  if (points.length === 1) line.style.strokeWidth = 8;
  const drawing = svgTag("svg", { viewBox: "0 0 300 100", preserveAspectRatio: "none", role: "img", "aria-label": `${title}, from ${number(ys[0])} to ${number(ys.at(-1))}` }, line);
  const range = element("div", { class: "note" }, points.length > 1 ? `${number(y0)} to ${number(y1)}, steps ${x0} to ${x1}` : `step ${x0}`);
  return element("figure", {}, element("figcaption", {}, element("span", {}, title), element("strong", {}, number(ys.at(-1)))), drawing, range);
}

function table(object) {
  const rows = Object.entries(object).map(([key, value]) => element("tr", {}, element("td", {}, key), element("td", {}, typeof value === "object" ? JSON.stringify(value) : String(value))));
  return element("table", {}, ...rows);
}

function showStage(name, stage, open) {
  const total = stage.settings.num_iterations;
  const facts = `step ${stage.step}${total ? ` of ${total}` : ""}, ${Math.round(stage.time_s)} s of training, ${stage.checkpoints.length} checkpoint${stage.checkpoints.length === 1 ? "" : "s"}`;
  const details = (title, content) => {
    const box = element("details", { "data-key": `${name}/${title}` }, element("summary", {}, title), content);
    box.open = open.has(`${name}/${title}`);
    return box;
  };
  const samples = stage.samples.slice().reverse().map((s) => element("blockquote", {}, element("b", {}, `step ${s.step}: ${s.prompt}`), s.text));
  const parts = [element("h2", {}, stage.title), element("p", { class: "note" }, facts), element("div", { class: "grid" }, ...stage.curves.map(drawCurve))];
  if (samples.length) parts.push(details("Samples", element("div", {}, ...samples)));
  if (Object.keys(stage.evaluation).length) parts.push(details("Evaluation", table(stage.evaluation)));
  parts.push(details("Settings", table(stage.settings)));
  return element("section", {}, ...parts);
}

let shown = "";  // the run as it was drawn

async function refresh() {
  try {
    const runs = await get("api/runs");
    if (!runs.length) {
      shown = "";
      main.replaceChildren(element("p", {}, "No run yet: train one with bash runs/demo.sh."));
      return;
    }
    const chosen = runs.find((run) => run.tag === choice.value)?.tag ?? runs[0].tag;
    if ([...choice.options].map((o) => o.value).join() !== runs.map((run) => run.tag).join()) {
      choice.replaceChildren(...runs.map((run) => element("option", { value: run.tag }, run.tag)));
    }
    choice.value = chosen;
    const run = await get(`api/runs/${encodeURIComponent(chosen)}`);
    const newest = Math.max(...Object.values(run.stages).map((stage) => stage.updated));
    const training = Date.now() / 1000 - newest < LIVE_S;
    say(training ? "● training" : "", training ? "live" : "");
    const news = JSON.stringify(run);
    if (news === shown) return;  // what is being read, or has the focus, stays
    shown = news;
    const open = new Set([...main.querySelectorAll("details[open]")].map((box) => box.dataset.key));
    const focused = document.activeElement?.closest("details")?.dataset.key;
    main.replaceChildren(...Object.entries(run.stages).map(([name, stage]) => showStage(name, stage, open)));
    if (focused) main.querySelector(`details[data-key="${CSS.escape(focused)}"] summary`)?.focus();
  } catch (error) {
    say(error.message, "");
  }
}

function say(text, className) {
  if (live.textContent === text) return;  // a screen reader says it once
  live.textContent = text;
  live.className = className;
}

choice.addEventListener("change", refresh);
for (;;) {
  const began = performance.now();
  if (!document.hidden) await refresh();
  const rest = Math.max(PERIOD_MS, 20 * (performance.now() - began));  // a long run takes half a second to read
  await new Promise((resume) => setTimeout(resume, rest));
}
