// The chat page: what is shown, and what its buttons do.

import * as api from "./api.js";
import { answer, copy, element, hideThought, morph, plainText, tabStopOf, tokenView } from "./render.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const [log, form, text, send, list, status] = ["log", "form", "text", "send", "conversations", "status"].map($);
const settings = store.settings;
let current = null;  // the conversation that is shown
let running = null;  // {controller, node, ended} of the answer that is being written; ended: a promise
const MOST_MESSAGES = 1000, MOST_CHARS = 150000;  // of a conversation that is sent
let inside = false;
let ready = true;  // false: the server's model is being compiled, and answers wait for it
// Enter that sends: not Shift's, nor an input method's that ends a word (which Safari tells by its key code alone).
// On a phone, whose keys know no Shift+Enter, it begins a line.
const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229 && !matchMedia("(pointer: coarse)").matches;

// ---------------------------------------------------------------------------- showing

function show(conversation, ...notices) {
  const place = conversation === current && !isAtEnd() ? log.scrollTop : Infinity;  // of a reader who went up
  const focused = document.activeElement;
  current = conversation;
  hideThought();
  $("title").textContent = conversation.title;
  const nodes = store.path(conversation);
  put(log, ...(nodes.length ? nodes.map(draw) : [greeting]), ...(inside && nodes.length ? [reading.box] : []), ...notices);
  reading.look();
  showList();
  if (!focused.isConnected) log.focus();
  log.scrollTop = Math.min(place, log.scrollHeight);
}

const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;

// Makes these the children, and leaves alone those that are: they keep the focus, and what is selected in them.
function put(parent, ...children) {
  const kept = new Set(children);
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
  let at = parent.firstChild;
  for (const child of children) {
    if (child === at) at = at.nextSibling; else parent.insertBefore(child, at);
  }
}

// The same element for the same message or conversation, however often it is shown.
function once(make) {
  const made = new WeakMap();
  return (key) => made.get(key) ?? made.set(key, make(key)).get(key);
}

const button = (label, onclick, attributes = {}) => element("button", { type: "button", onclick, ...attributes }, label);

function welcome() {
  const ideas = ["Who are you?", "What is 23 + 58?", "How many r are in strawberry?"];
  const buttons = ideas.map((idea) => button(idea, () => ask(idea)));
  return element("div", {}, element("p", { class: "hint" }, "Ask the model something. It is small: be kind."), element("div", { class: "suggestions" }, ...buttons));
}

const greeting = welcome(), reading = readingView();

function showList() {
  const shown = store.all().filter((c) => c === current || c.nodes.root.children.length);
  put(list, ...shown.map((conversation) => {
    const row = rowOf(conversation);
    row.open.textContent = row.deleted.firstChild.textContent = conversation.title;
    row.open.ariaCurrent = conversation === current ? "true" : null;
    row.remove.ariaLabel = `Delete ${conversation.title}`;
    put(row.box, ...(conversation.deleted ? [row.deleted, row.undo] : [row.open, row.remove]));
    return row.box;
  }));
}

const rowOf = once((conversation) => ({
  box: element("li"),
  open: button("", () => { if (conversation !== current) { stop(); show(conversation); } closeSidebar(); }, { class: "open", dir: "auto" }),
  remove: button("✕", () => forget(conversation), { title: "Delete" }),
  deleted: element("span", { class: "open", dir: "auto" }, element("del")),
  undo: button("Undo", () => { store.restore(conversation); showList(); rowOf(conversation).open.focus(); }),
}));

function forget(conversation) {
  if (conversation === current) stop();
  store.remove(conversation);
  if (conversation === current) show(store.create()); else showList();
  rowOf(conversation).undo.focus();
  status.textContent = `Deleted: ${conversation.title}`;
}

const viewOf = once((node) => {
  const user = node.role === "user";
  const content = element("div", { class: "content", dir: user ? "auto" : null });
  const view = { content, actions: element("div", { class: "actions" }), count: element("span"), note: element("span", { class: "note" }), drawn: "" };
  const go = async (step, name) => {
    await stop();  // an answer is stored when it has ended, not before
    const parent = current.nodes[node.parent], versions = parent.children;
    parent.chosen = (versions.indexOf(node.id) + step + versions.length) % versions.length;
    store.save(current);
    show(current);
    viewOf(current.nodes[versions[parent.chosen]])[name].focus();
  };
  return Object.assign(view, {
    box: element("article", { class: `message ${node.role}`, "aria-label": user ? "You" : "nanochat" }),
    back: button("‹", () => go(-1, "back"), { "aria-label": "Previous version" }),
    on: button("›", () => go(1, "on"), { "aria-label": "Next version" }),
    copy: button("Copy", (event) => copy(plainText(node.content), event.target)),
    edit: button("Edit", () => edit(node)),
    again: button("Try again", () => respond(node)),
    regenerate: button("Regenerate", () => regenerate(node)),
    editor: null,
  });
});

// A message's element, with what has changed in it.
function draw(node) {
  const view = viewOf(node), isRunning = running?.node === node;
  const versions = current.nodes[node.parent].children;
  const shown = JSON.stringify([inside, node.content, inside && node.tokens]);
  if (view.drawn !== shown) fill(view.content, node);
  view.drawn = shown;
  view.content.classList.toggle("cursor", isRunning);
  view.count.textContent = `${versions.indexOf(node.id) + 1}/${versions.length}`;
  view.note.textContent = isRunning && !ready ? "the model is getting ready…" : node.note ?? "";
  const actions = versions.length > 1 ? [view.back, view.count, view.on, view.copy] : [view.copy];
  if (node.role === "user") actions.push(view.edit);
  else if (!isRunning) actions.push(view.regenerate);
  if (node.role === "user" && !node.children.length && !running) actions.push(view.again);  // it was never answered
  if (view.note.textContent) actions.push(view.note);
  put(view.actions, ...actions);
  put(view.box, ...(view.editor ? [view.editor] : [view.content, view.actions]));
  return view.box;
}

function fill(content, node) {
  if (inside && node.role === "user" && !node.tokens) readTokens(node);
  const fresh = content.cloneNode(false);
  const tabStop = tabStopOf(content.querySelector(".tokens"));  // the focus stays where it is
  fresh.append(inside && node.tokens?.length ? tokenView(node.tokens, tabStop) : node.role === "user" ? node.content : answer(node.content));
  morph(content, fresh);
}

// A question's tokens, asked for when they are first looked at.
async function readTokens(node) {
  node.tokens = [];
  try {
    const read = await api.tokenize({ prompt: node.content });
    node.tokens = read.token_strs.map((token) => ({ text: token }));
    if (current.nodes[node.id] === node) draw(node);
  } catch {  // the text itself stays
    delete node.tokens;
  }
}

// All that the model reads, token by token.
function readingView() {
  const text = element("div", {}, "…");
  const box = element("details", { class: "note" }, element("summary", {}, "The conversation as the model reads it"), text);
  const look = async () => {
    if (!box.open || !box.isConnected) return;
    try {
      const messages = toMessages(store.path(current));
      while (messages.length && messages.at(-1).role !== "user") messages.pop();
      const read = await api.tokenize({ messages, max_tokens: Number(settings.max_tokens) || null });
      text.replaceChildren(`${read.count} of at most ${read.max_model_len} tokens`, tokenView(read.token_strs.map((token) => ({ text: token }))));
    } catch (error) {
      text.textContent = error.message;
    }
  };
  box.addEventListener("toggle", look);
  return { box, look };
}

function edit(node) {
  const field = element("textarea", { rows: 3, dir: "auto", "aria-label": "Edit the message" });
  const view = viewOf(node);
  field.value = node.content;
  const save = () => { const content = field.value.trim(); if (content) { view.editor = null; ask(content, current.nodes[node.parent]); } };
  const cancel = () => { view.editor = null; draw(node); view.edit.focus(); };
  field.addEventListener("keydown", (event) => {
    if (sends(event)) { event.preventDefault(); save(); }
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
  });
  view.editor = element("div", { class: "edit" }, field, element("div", { class: "bar" },
    button("Cancel", cancel), button("Send as a new branch", save, { class: "primary" })));
  draw(node);
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
  store.purge();
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
  return element("div", { class: "message error", role: "alert" }, element("div", { class: "content" }, failure.message));
}

// The answer that is being written, once for each frame however many tokens came.
let drawing = false;
function redraw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    if (running?.conversation !== current) return;  // an answer goes on until the browser has heard that it was stopped
    const atEnd = isAtEnd();
    draw(running.node);
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
  show(store.all().find((c) => !c.nodes.root.children.length && !c.deleted) ?? store.create());
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
    if (output) output.textContent = settings[field.name];  // a slider stands at the nearest step
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
    const health = await api.get("health");
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
addEventListener("storage", () => {  // another tab has stored something
  store.refresh(current);
  show(current, ...log.querySelectorAll(":scope > .error"));
  if (!dialog.open) showSettings();
});
