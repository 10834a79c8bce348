// What the browser remembers: settings and conversations. A conversation is a tree, so that an edited question or a
// regenerated answer is a branch beside the old one, and nothing is lost.

// What is empty is the server's to say: see `setDefaults`.
const DEFAULTS = {
  temperature: "", top_k: "", top_p: 1, max_tokens: "", seed: "", system: "", theme: "", api_key: "",
};

function read(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {  // not ours, or storage is forbidden: begin anew
    return otherwise;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;  // full, or forbidden
  }
}

export const settings = { ...DEFAULTS, ...read("nanochat.settings", {}) };

const changed = (values) => Object.fromEntries(Object.entries(values).filter(([name, value]) => String(value) !== String(DEFAULTS[name])));

export function set(name, value) {
  settings[name] = value;
  write("nanochat.settings", changed({ ...read("nanochat.settings", {}), [name]: value }));  // the others may be another tab's
}

export function resetSettings() {
  const { api_key, system } = settings;  // nobody's defaults
  Object.assign(settings, DEFAULTS, { api_key, system });
  write("nanochat.settings", changed(settings));
}

export function setDefaults(defaults) {
  const kept = changed(settings);
  Object.assign(DEFAULTS, defaults);
  Object.assign(settings, DEFAULTS, kept);
}

const stored = () => read("nanochat.conversations", []).filter((c) => c?.nodes?.root);
let conversations = stored();
const MOST_DELETED = 200;  // ids that are kept, so that another tab does not store such a conversation again

export const all = () => conversations;

// No two tabs make the same: what both add to one conversation is kept.
const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 7);

export function create() {
  const conversation = { id: newId(), title: "New chat", nodes: { root: { id: "root", children: [], chosen: 0 } } };
  conversations.unshift(conversation);
  return conversation;
}

// It stays at its place in the list, so that this can be undone, until `purge`.
export function remove(conversation) {
  conversation.deleted = true;
  write("nanochat.conversations", stored().filter((c) => c.id !== conversation.id));
  write("nanochat.deleted", [...read("nanochat.deleted", []), conversation.id].slice(-MOST_DELETED));
}

export function purge() {
  conversations = conversations.filter((c) => !c.deleted);
}

// One that somebody goes on in although it was deleted, here or in another tab.
export function restore(conversation) {
  delete conversation.deleted;
  const deleted = read("nanochat.deleted", []);
  if (deleted.includes(conversation.id)) write("nanochat.deleted", deleted.filter((id) => id !== conversation.id));
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  return save(conversation);
}

// Only this conversation: of the others, another tab may have stored more than this one knows. If the browser's storage
// is full, what lies inside old answers is forgotten first, then the oldest of the other conversations. False if even this
// one alone is too large.
export function save(conversation) {
  let kept = stored();
  const at = kept.findIndex((c) => c.id === conversation.id);
  if (at < 0 && read("nanochat.deleted", []).includes(conversation.id)) return true;  // while an answer came: it stays so
  if (at < 0) kept.unshift(conversation);
  else kept[at] = joined(conversation, kept[at]);
  if (!write("nanochat.conversations", kept)) {
    kept = kept.map(withoutTokens);
    while (!write("nanochat.conversations", kept)) {
      const oldest = kept.findLastIndex((c) => c.id !== conversation.id);
      if (oldest < 0) return false;
      kept = kept.toSpliced(oldest, 1);
    }
  }
  return true;
}

function withoutTokens(conversation) {
  const nodes = Object.entries(conversation.nodes).map(([id, { tokens, ...node }]) => [id, node]);
  return { ...conversation, nodes: Object.fromEntries(nodes) };
}

// `conversation` with the messages that another tab added to it: branches beside its own. An answer only grows: the longer
// is the newer.
function joined(conversation, other) {
  for (const node of Object.values(other.nodes)) {
    const own = conversation.nodes[node.id] ??= node;
    own.children = [...new Set([...own.children, ...node.children])];
    if (JSON.stringify(node.content)?.length > JSON.stringify(own.content)?.length) Object.assign(own, { content: node.content, tokens: node.tokens });
    if (node.note) own.note ??= node.note;
  }
  return conversation;
}

// What another tab has stored since. `open`, which is shown here, stays even if it was deleted there.
export function refresh(open) {
  Object.assign(settings, DEFAULTS, read("nanochat.settings", {}));
  const mine = new Map([...conversations, open].map((c) => [c.id, c]));
  const kept = stored().map((other) => (mine.has(other.id) ? joined(mine.get(other.id), other) : other));
  for (const conversation of kept) delete conversation.deleted;
  const deleted = new Set(read("nanochat.deleted", []));
  const others = conversations.filter((c) => !kept.includes(c) && (c === open || c.deleted || !deleted.has(c.id)));
  conversations = [...others, ...kept];
}

// A message after `parent`; the branch that it begins is the one that is shown.
export function add(conversation, parent, role, content) {
  const node = { id: newId(), parent: parent.id, role, content, children: [], chosen: 0 };
  conversation.nodes[node.id] = node;
  parent.chosen = parent.children.push(node.id) - 1;
  if (parent.id === "root" && role === "user" && conversation.title === "New chat") conversation.title = [...content].slice(0, 60).join("");
  return node;
}

// Take a message away again; `chosen`: which of its siblings was shown before it came.
export function removeNode(conversation, node, chosen) {
  const parent = conversation.nodes[node.parent];
  parent.children = parent.children.filter((id) => id !== node.id);
  parent.chosen = chosen;
  delete conversation.nodes[node.id];
}

// The messages of the branch that is shown, down to `last` if that is given.
export function path(conversation, last = null) {
  const nodes = [];
  let node = conversation.nodes.root;
  while (node.children.length) {
    node = conversation.nodes[node.children[node.chosen]];
    nodes.push(node);
    if (node === last) break;
  }
  return nodes;
}
