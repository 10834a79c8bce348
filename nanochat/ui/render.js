// Messages to elements. What a model or a user wrote reaches the page as text, or as Markdown through DOMPurify with a
// short list of elements: no scripts, styles, forms, frames or pictures, and links that open elsewhere.

const ALLOWED = {
  ALLOWED_TAGS: ["p", "br", "hr", "em", "strong", "del", "code", "pre", "blockquote", "ul", "ol", "li", "a", "h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"],
  ALLOWED_ATTR: ["href", "start", "align"],
  ALLOWED_URI_REGEXP: /^(https?:|mailto:)/i,
};

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// LaTeX, shown as it was written: \( \), \[ \] and $$ $$ without an empty line between them, and $ $ in one line, with no
// space inside and no digit after, as prices have it.
const MATH = /^(?:\\\((?:(?!\n\s*\n)[^])+?\\\)|\\\[(?:(?!\n\s*\n)[^])+?\\\]|\$\$(?:(?!\n\s*\n)[^])+?\$\$|\$(?![\s$])(?:\\.|[^$`\\\n])+?(?<!\s)\$(?![\d$]))/;
const verbatim = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll("\n", "<br>");
const math = {
  name: "math",
  level: "inline",
  start: (source) => source.match(/\$|\\[([]/)?.index,
  tokenizer(source) {
    const raw = source.match(MATH)?.[0];
    return raw && { type: "math", raw };
  },
  renderer: ({ raw }) => verbatim(raw),
};
const mathBlock = {  // or its lines might begin a list
  name: "mathBlock",
  level: "block",
  start: (source) => source.match(/(?<=\n) {0,3}(?:\\\[|\$\$)/)?.index,
  tokenizer(source) {
    const indent = source.match(/^ {0,3}(?=\\\[|\$\$)/)?.[0];
    const raw = indent !== undefined && source.slice(indent.length).match(MATH)?.[0];
    const end = raw && source.slice(indent.length + raw.length).match(/^[ \t]*(?:\n+|$)/)?.[0];
    return end === undefined || !raw ? undefined : { type: "mathBlock", raw: indent + raw + end, text: raw };
  },
  renderer: ({ text }) => `<p>${verbatim(text)}</p>`,
};

// What looks like HTML, or defines a link, is text, since models write List<String> and x<y; an asterisk after an English letter, a
// digit or a bracket multiplies. Pictures and boxes that would be left out are shown as they were written.
globalThis.marked?.use({
  extensions: [math, mathBlock],
  tokenizer: {
    html() {}, tag() {}, def() {},
    emStrong: (source, masked, before) => (source[0] === "*" && /[\w)*]/.test(before) ? undefined : false),
  },
  renderer: {
    image: ({ raw }) => verbatim(raw),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

// Makes `old` what `fresh` is, and leaves alone what stays: it keeps the focus, and what is selected in it.
export function morph(old, fresh) {
  if (old.isEqualNode(fresh) || (old.tagName === "BUTTON" && fresh.tagName === "BUTTON")) return;
  if (old.data && fresh.data?.startsWith(old.data)) { old.appendData(fresh.data.slice(old.data.length)); return; }
  if (old.data !== undefined || !old.cloneNode(false).isEqualNode(fresh.cloneNode(false))) { old.replaceWith(fresh); return; }
  const olds = [...old.childNodes], children = [...fresh.childNodes];
  for (const rest of olds.slice(children.length)) rest.remove();
  children.forEach((child, i) => { if (i < olds.length) morph(olds[i], child); else old.append(child); });
}

// tools: elements that take the places of their numbers, which stand in the text between two characters of nobody's use.
export function markdown(text, tools = []) {
  const box = element("div", { class: "markdown" });
  try {
    box.innerHTML = DOMPurify.sanitize(marked.parse(text, { gfm: true, breaks: true, async: false }), ALLOWED);
  } catch {  // nested deeper than the parser can follow: shown as it was written
    box.replaceChildren(element("pre", {}, text));
  }
  const texts = document.createTreeWalker(box, NodeFilter.SHOW_TEXT), nodes = [];
  while (tools.length && texts.nextNode()) nodes.push(texts.currentNode);
  for (const node of nodes) node.replaceWith(...node.data.split(/\uE000(\d+)\uE001/).map((piece, i) => (i % 2 ? tools[piece] : piece)));
  box.append(...tools.filter((tool) => !tool.parentNode));  // such as stood in a link's address
  for (const block of box.children) if (block.tagName !== "PRE") block.dir = "auto";  // Arabic and Hebrew run from the right
  const headings = [...box.querySelectorAll("h1, h2, h3, h4, h5, h6")], ranks = [...new Set(headings.map((h) => h.tagName))].sort();
  for (const heading of headings) heading.ariaLevel = ranks.indexOf(heading.tagName) + 2;  // below the conversation's title
  for (const link of box.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const block of box.querySelectorAll("pre")) {
    block.append(element("button", { type: "button", onclick: ({ target }) => copy(target.previousSibling.textContent, target) }, "Copy"));
  }
  return box;
}

export async function copy(text, button) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else if (!copyFromField(text, button)) throw new Error("refused");
    flash(button, "Copied");
  } catch {
    flash(button, "Not allowed");
  }
}

// Over plain HTTP from another machine browsers have no clipboard, but still this.
function copyFromField(text, button) {
  const field = element("textarea", { class: "hidden-text", "aria-hidden": "true" });
  field.value = text;
  button.after(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  button.focus();
  return done;
}

function flash(button, text) {
  const before = button.dataset.label ?? (button.dataset.label = button.textContent);
  button.textContent = text;
  setTimeout(() => { button.textContent = before; }, 1200);
}

export const plainText = (content) =>
  typeof content === "string" ? content : content.filter((part) => part.type === "text").map((part) => part.text).join("");

// An answer: one piece of Markdown, with each call of the calculator and its result where it happened.
export function answer(content) {
  if (typeof content === "string") return markdown(content);
  const tools = [];
  const text = content.map((part) => {
    if (part.type === "text") return part.text.replace(/[\uE000\uE001]/g, "\uFFFD");
    return `\uE000${tools.push(element("span", { class: part.type === "python" ? "tool" : "tool output", dir: "ltr" }, part.text)) - 1}\uE001`;
  });
  return markdown(text.join(""), tools);
}

// ---------------------------------------------------------------------------- look inside

const bubble = document.getElementById("thought");
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob > Math.log(0.1) ? 0 : 2)}%`;
const visible = (text) => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥");
const spoken = (text) => text.trim() || text.replaceAll(" ", "space ").replaceAll("\n", "line break ").replaceAll("\t", "tab ").trim();

export function hideThought() {  // also where its token is drawn anew or scrolled away, of which the token does not tell
  bubble.hidden = true;
  bubble.replaceChildren();  // or it would describe the next token
}

// tokens: [{text, logprob, top: [[text, logprob], ...]}]; logprob is null where the token was not chosen by the model, and
// undefined in what it only read. Tab comes to one token of an answer, the `tabStop`th, and arrows go on from there.
export function tokenView(tokens, tabStop = 0) {
  const box = element("div", { class: "tokens" });
  for (const token of tokens) {
    const special = /^<\|.*\|>$/.test(token.text);
    const span = element("span", { class: special ? "special" : "" }, visible(token.text));
    if (token.logprob !== undefined) makeOption(span, token, box.childElementCount === tabStop);
    box.append(span);
  }
  if (box.querySelector("[role=option]")) {
    box.role = "listbox";
    box.ariaLabel = "Tokens of the answer";
    box.addEventListener("focusin", ({ target }) => { for (const span of box.children) span.tabIndex = span === target ? 0 : -1; });
    box.addEventListener("keydown", moveFocus);
  }
  return box;
}

export const tabStopOf = (box) => Math.max(0, [...(box?.children ?? [])].findIndex((span) => span.tabIndex === 0));

function makeOption(span, token, isTabStop) {
  const p = Math.exp(token.logprob);
  span.classList.add(token.logprob === null ? "forced" : p > 0.8 ? "p1" : p > 0.4 ? "p2" : p > 0.1 ? "p3" : "p4");
  span.role = "option";
  span.tabIndex = isTabStop ? 0 : -1;
  span.ariaLabel = `${spoken(token.text)}, ${token.logprob === null ? "given" : percent(token.logprob)}`;
  span.setAttribute("aria-describedby", bubble.id);
  for (const name of ["mouseenter", "focus"]) span.addEventListener(name, () => think(span, token));
  for (const name of ["mouseleave", "blur"]) span.addEventListener(name, hideThought);
}

function moveFocus(event) {
  const spans = [...event.currentTarget.children], at = spans.indexOf(event.target), last = spans.length - 1;
  const to = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: last }[event.key];
  if (to === undefined || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;  // the browser's own
  event.preventDefault();
  spans[to]?.focus();
}

function think(span, token) {
  const rows = token.top.map(([text, logprob]) => element("tr", {},
    element("td", {}, visible(text).replaceAll("\n", "")),
    element("td", {}, element("meter", { value: Math.exp(logprob), "aria-hidden": "true" })), element("td", {}, percent(logprob))));
  const chosen = token.logprob === null ? "not chosen by the model" : `chosen: “${visible(token.text)}” with ${percent(token.logprob)}`;
  bubble.replaceChildren(element("div", {}, chosen), element("table", {}, ...rows));
  bubble.hidden = false;
  const at = span.getBoundingClientRect();
  bubble.style.left = `${Math.max(8, Math.min(at.left, innerWidth - bubble.offsetWidth - 8))}px`;
  const below = at.bottom + bubble.offsetHeight + 8 < innerHeight;
  bubble.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - bubble.offsetHeight - 6)}px`;
}
