// The chat page: what is shown, and what its buttons do.

import * as api from "./api.js";
import { answer, copy, element, hideThought, plainText, tokenView } from "./render.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const [log, form, text, send, list, status] = ["log", "form", "text", "send", "conversations", "status"].map($);
const settings = store.settings;
let current = null;  // the conversation that is shown
let running = null;  // {controller, node, ended} of the answer that is being written; ended: a promise
const edits = new WeakMap();  // of a message: its open edit, which every redraw puts back
const MOST_MESSAGES = 1000, MOST_CHARS = 150000;  // of a conversation that is sent
let inside = false;
let ready = true;  // false: the server's model is being compiled, and answers wait for it
// Enter that sends: not Shift's, nor an input method's that ends a word (which Safari tells by its key code alone).
// On a phone, whose keys know no Shift+Enter, it begins a line.
const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229 && !matchMedia("(pointer: coarse)").matches;

// ---------------------------------------------------------------------------- showing

function show(conversation, ...notices) {
  const place = conversation === current && !isAtEnd() ? log.scrollTop : Infinity;  // of a reader who went up
  current = conversation;
  hideThought();
  $("title").textContent = conversation.title;
  const nodes = store.path(conversation);
  keepFocus(() => {
    log.replaceChildren(...(nodes.length ? nodes.map(showMessage) : welcome()));
    if (inside && nodes.length) log.append(readingView(nodes));
    log.append(...notices);
    showList();
    log.scrollTop = Math.min(place, log.scrollHeight);
  });
}

const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
const nameOf = (control) => control.title || control.getAttribute("aria-label") || control.textContent;
const controlOf = (item, name) => [...item.querySelectorAll("button, summary, [tabindex]")].find((control) => nameOf(control) === name);

// Drawing anew removes the control that has the focus: it goes to the one of that name in the same message or conversation
// of the list, or in what took its place; else to the log.
function keepFocus(draw) {
  const focused = document.activeElement;
  const item = focused?.closest("#log > *, #conversations > *");
  const box = item?.parentElement;
  const at = box && [...box.children].indexOf(item);
  draw();
  if (!item) return;
  if (box.contains(focused)) { focused.focus(); return; }  // an edit: its writer goes on
  const same = [...box.children].find((other) => other.dataset.id && other.dataset.id === item.dataset.id);
  const successor = same ?? box.children[at] ?? box.lastElementChild;
  (controlOf(successor, nameOf(focused)) ?? log).focus();
}

function welcome() {
  const ideas = ["Who are you?", "What is 23 + 58?", "How many r are in strawberry?"];
  const buttons = ideas.map((idea) => element("button", { onclick: () => ask(idea) }, idea));
  return [element("p", { class: "hint" }, "Ask the model something. It is small: be kind."), element("div", { class: "suggestions" }, ...buttons)];
}

function showList() {
  const shown = store.all().filter((c) => c === current || c.nodes.root.children.length);
  list.replaceChildren(...shown.map((conversation) => element("li", { "data-id": conversation.id },
    element("button", { class: "open", dir: "auto", "aria-current": conversation === current ? "true" : null, onclick: () => { stop(); show(conversation); closeSidebar(); } }, conversation.title),
    element("button", { "aria-label": `Delete ${conversation.title}`, title: "Delete", onclick: () => forget(conversation) }, "✕"))));
}

function forget(conversation) {
  if (conversation === current) stop();
  store.remove(conversation);
  if (conversation === current) show(store.create()); else keepFocus(showList);
}

function showMessage(node) {
  if (edits.has(node)) return edits.get(node);
  const content = element("div", { class: "content", dir: node.role === "user" ? "auto" : null });
  const box = element("article", { class: `message ${node.role}`, "aria-label": node.role === "user" ? "You" : "nanochat" }, content);
  fill(content, node);
  const siblings = current.nodes[node.parent].children;
  const button = (label, action) => element("button", { type: "button", onclick: action }, label);
  const actions = element("div", { class: "actions" });
  if (siblings.length > 1) {
    const at = siblings.indexOf(node.id);
    const go = async (step) => {
      await stop();  // an answer is stored when it has ended, not before
      const parent = current.nodes[node.parent];
      parent.chosen = (at + step + parent.children.length) % parent.children.length;
      store.save(current);
      show(current);
    };
    const arrow = (label, name, step) => element("button", { type: "button", "aria-label": name, onclick: () => go(step) }, label);
    actions.append(arrow("‹", "Previous version", -1), `${at + 1}/${siblings.length}`, arrow("›", "Next version", 1));
  }
  actions.append(button("Copy", (event) => copy(plainText(node.content), event.target)));
  if (node.role === "user") {
    actions.append(button("Edit", () => edit(box, node)));
    if (!node.children.length && !running) actions.append(button("Try again", () => respond(node)));  // it was never answered
  } else if (running?.node !== node) {
    actions.append(button("Regenerate", () => regenerate(node)));
  }
  const note = running?.node === node && !ready ? "the model is getting ready…" : node.note;
  if (note) actions.append(element("span", { class: "note" }, note));
  box.append(actions);
  return box;
}

function fill(content, node) {
  if (inside && node.role === "user" && !node.tokens) readTokens(content, node);
  if (inside && node.tokens?.length) content.replaceChildren(tokenView(node.tokens));
  else if (node.role === "user") content.replaceChildren(node.content);
  else content.replaceChildren(...answer(node.content));
  content.classList.toggle("cursor", running?.node === node);
}

// A question's tokens, asked for when they are first looked at.
async function readTokens(content, node) {
  node.tokens = [];
  try {
    const read = await api.tokenize({ prompt: node.content });
    node.tokens = read.token_strs.map((token) => ({ text: token }));
    if (inside) content.replaceChildren(tokenView(node.tokens));
  } catch {  // the text itself stays
    delete node.tokens;
  }
}

// All that the model reads, token by token.
function readingView(nodes) {
  const box = element("div", {}, "…");
  const details = element("details", { class: "note" }, element("summary", {}, "The conversation as the model reads it"), box);
  details.addEventListener("toggle", async () => {
    if (!details.open) return;
    try {
      const messages = toMessages(nodes);
      while (messages.length && messages.at(-1).role !== "user") messages.pop();
      const read = await api.tokenize({ messages });
      box.replaceChildren(`${read.count} of at most ${read.max_model_len} tokens`, tokenView(read.token_strs.map((token) => ({ text: token }))));
    } catch (error) {
      box.textContent = error.message;
    }
  });
  return details;
}

function edit(box, node) {
  const field = element("textarea", { rows: 3, dir: "auto", "aria-label": "Edit the message" });
  field.value = node.content;
  const save = () => { const content = field.value.trim(); if (content) { edits.delete(node); ask(content, current.nodes[node.parent]); } };
  const cancel = () => {
    const at = [...log.children].indexOf(box);
    edits.delete(node);
    show(current);
    controlOf(log.children[at], "Edit").focus();
  };
  field.addEventListener("keydown", (event) => {
    if (sends(event)) { event.preventDefault(); save(); }
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
  });
  box.replaceChildren(element("div", { class: "edit" }, field, element("div", { class: "bar" },
    element("button", { type: "button", onclick: cancel }, "Cancel"), element("button", { type: "button", class: "primary", onclick: save }, "Send as a new branch"))));
  edits.set(node, box);
  field.focus();
}

// ---------------------------------------------------------------------------- asking

// The newest turns, no more than the server takes: no context has room for so many.
function toMessages(nodes) {
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  let first = nodes.length, chars = 0;
  while (first > 0 && nodes.length - first < MOST_MESSAGES && (chars += JSON.stringify(nodes[first - 1].content).length) < MOST_CHARS) first--;
  while (first < nodes.length - 1 && nodes[first].role !== "user") first++;
  const kept = nodes.slice(Math.min(first, nodes.length - 1));
  return [...system, ...kept.map(({ role, content }) => ({ role, content }))];
}

async function ask(content, parent = null) {
  while (running) await stop();
  // After the last answer: a question that has none is left beside this one, or the model would read both as one.
  parent ??= store.path(current).findLast((node) => node.role === "assistant") ?? current.nodes.root;
  const node = store.add(current, parent, "user", content);
  log.scrollTop = log.scrollHeight;
  respond(node);
}

function regenerate(node) {
  if (!running) respond(current.nodes[node.parent]);
}

function respond(question) {
  store.restore(current);  // at once: an answer may take minutes
  const controller = new AbortController();
  const chosen = question.chosen;
  running = { controller, conversation: current, node: store.add(current, question, "assistant", []), chosen };
  running.ended = receive(current, question, running.node, controller.signal);
}

async function receive(conversation, question, node, signal) {
  send.textContent = "Stop";
  show(conversation);
  log.setAttribute("aria-busy", "true");
  status.textContent = "The model is answering.";
  showHealth();  // since the page was loaded, the server may have been started again
  let failure = null, index = null;  // index: of the part that is being written
  try {
    for await (const event of api.stream(toMessages(store.path(conversation, question)), inside, signal)) {
      if (event.token) {
        if (event.index !== index) node.content.push({ type: event.part, text: "" });
        index = event.index;
        node.content.at(-1).text += event.token;
      }
      if (event.tokens) node.tokens = [...(node.tokens ?? []), ...event.tokens];
      if (event.dropped_turns) node.note = `no room is left for the oldest ${event.dropped_turns === 1 ? "turn" : `${event.dropped_turns} turns`}`;
      if (event.done && !node.content.length) node.note = "the model said nothing";
      if (event.done && event.finish_reason === "length") node.note = "cut at the longest answer allowed";
      if (event.done && event.finish_reason === "context") node.note = "the model's context is full";
      if (current === conversation) redraw();
    }
  } catch (error) {
    if (error.name === "AbortError") node.note = "stopped";
    else failure = error;
  }
  const { chosen } = running;
  running = null;
  send.textContent = "Send";
  log.removeAttribute("aria-busy");
  if (failure && node.content.length && node.note !== "stopped") node.note = "cut off";
  if (!node.content.length && !node.note) store.removeNode(conversation, node, chosen);
  if (!store.save(conversation)) node.note ??= "this browser's storage is full: the conversation will not be there after a reload";
  if (current === conversation) show(conversation, ...(failure ? [failureNotice(failure)] : []));
  status.textContent = failure ? "The answer failed." : `The answer: ${plainText(node.content).slice(0, 500)}`;
}

function failureNotice(failure) {
  return element("article", { class: "message error", role: "alert" }, element("div", { class: "content" }, failure.message));
}

// The answer that is being written, once for each frame however many tokens came.
let drawing = false;
function redraw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    if (running?.conversation !== current) return;  // an answer goes on until the browser has heard that it was stopped
    const box = [...log.querySelectorAll(".message.assistant")].at(-1);
    if (!box) return;
    const atEnd = isAtEnd();
    hideThought();
    fill(box.querySelector(".content"), running.node);
    if (atEnd) log.scrollTop = log.scrollHeight;  // unless the reader went up to read
  });
}

log.addEventListener("scroll", () => { if (!document.activeElement.closest(".tokens")) hideThought(); });  // the focus scrolls to its token
const keepSoFar = () => { if (running?.node.content.length) store.save(running.conversation); };
document.addEventListener("visibilitychange", () => { if (document.hidden) keepSoFar(); });  // phones end such a page without a word
addEventListener("pagehide", () => {  // a reload
  if (running?.node.content.length) running.node.note = "stopped";
  keepSoFar();
});

// The promise is kept when the answer that was being written has ended.
function stop() {
  running?.controller.abort();
  return running?.ended;
}

// ---------------------------------------------------------------------------- controls

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) { stop(); return; }
  const content = text.value.trim();
  if (!content) return;
  text.value = "";
  text.style.height = "";
  ask(content);
});
text.addEventListener("keydown", (event) => {
  if (sends(event)) { event.preventDefault(); if (!running) form.requestSubmit(); }
});
text.addEventListener("input", () => { text.style.height = ""; text.style.height = `${text.scrollHeight}px`; });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideThought();
  if (event.key === "Escape" && $("sidebar").classList.contains("shown")) closeSidebar();
  else if (event.key === "Escape" && running && !$("settings").open) stop();
  if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) { event.preventDefault(); begin(); }
});

function begin() {
  stop();
  show(store.all().find((c) => !c.nodes.root.children.length) ?? store.create());
  closeSidebar();
  text.focus();
}
$("new").addEventListener("click", begin);

function showSidebar(shown) {  // on a phone, where it covers the rest
  $("sidebar").classList.toggle("shown", shown);
  $("column").inert = shown;
  $("open-sidebar").setAttribute("aria-expanded", String(shown));
  $(shown ? "close-sidebar" : "open-sidebar").focus();
}
const closeSidebar = () => { if ($("sidebar").classList.contains("shown")) showSidebar(false); };
$("open-sidebar").addEventListener("click", () => showSidebar(true));
$("close-sidebar").addEventListener("click", closeSidebar);
document.addEventListener("click", (event) => { if (!event.composedPath().some((node) => ["sidebar", "open-sidebar"].includes(node.id))) closeSidebar(); });

$("inside").addEventListener("click", () => {
  inside = !inside;
  $("inside").setAttribute("aria-pressed", String(inside));
  show(current);
});

// ---------------------------------------------------------------------------- settings

const dialog = $("settings");
function showSettings() {
  for (const field of dialog.querySelectorAll("[name]")) {
    field.value = settings[field.name];
    const output = field.parentElement.querySelector("output");
    if (output) output.textContent = field.value;
  }
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}
dialog.addEventListener("input", ({ target }) => {
  if (!target.validity.valid) return;  // half typed, or out of range
  store.set(target.name, target.value);
  showSettings();
});
$("open-settings").addEventListener("click", () => { showSettings(); dialog.showModal(); });
$("reset-settings").addEventListener("click", () => { store.resetSettings(); showSettings(); });

showSettings();
let nextLook = null;
async function showHealth() {
  clearTimeout(nextLook);
  try {
    const health = await api.get("/health");
    store.setDefaults(health.defaults);
    $("model").textContent = health.ready ? health.model : `${health.model} is getting ready…`;
    const changed = ready !== health.ready;
    ready = health.ready;
    if (changed && running) show(current);
    if (!ready) nextLook = setTimeout(showHealth, 1000);  // questions asked meanwhile are answered when it is
  } catch (error) {
    $("model").textContent ||= error.message;  // asked again at the next question
  }
}
showHealth();
show(store.all()[0] ?? store.create());
