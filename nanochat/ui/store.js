// What the browser remembers: settings and conversations. A conversation is a tree, so that an edited question or a
// regenerated answer is a branch beside the old one, and nothing is lost.

export const DEFAULTS = {
  temperature: 0.8, top_k: 50, top_p: 1, max_tokens: 512, seed: "", system: "", theme: "", api_key: "",
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
export const saveSettings = () => write("nanochat.settings", settings);

let conversations = read("nanochat.conversations", []).filter((c) => c?.nodes?.root);

export const all = () => conversations;

export function create() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 7);
  const conversation = { id, title: "New chat", nodes: { root: { id: "root", children: [], chosen: 0 } }, next: 1 };
  conversations.unshift(conversation);
  return conversation;
}

export function remove(conversation) {
  conversations = conversations.filter((c) => c !== conversation);
  save();
}

// Conversations without a message are not kept. If the browser's storage is full, the oldest are forgotten.
export function save() {
  let kept = conversations.filter((c) => c.nodes.root.children.length);
  while (!write("nanochat.conversations", kept) && kept.length > 1) kept = kept.slice(0, -1);
}

// A message after `parent`; the branch that it begins is the one that is shown.
export function add(conversation, parent, role, content) {
  const node = { id: String(conversation.next++), parent: parent.id, role, content, children: [], chosen: 0 };
  conversation.nodes[node.id] = node;
  parent.chosen = parent.children.push(node.id) - 1;
  if (parent.id === "root" && role === "user" && conversation.title === "New chat") conversation.title = content.slice(0, 60);
  return node;
}

export function removeLast(conversation, node) {
  const parent = conversation.nodes[node.parent];
  parent.children = parent.children.filter((id) => id !== node.id);
  parent.chosen = Math.max(0, parent.children.length - 1);
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
