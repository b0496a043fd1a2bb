// A small part of Markdown as DOM nodes: paragraphs, headings, lists, rules, code, bold and italics. Everything else
// stays the text it is. Text only ever becomes text nodes, so no answer can become markup or a script.

import { element } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^#{1,6}\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const INLINE = /`([^`\n]+)`|\*\*([^\s*][^*\n]*(?:\*[^*\n]+)*)\*\*|(?<![\w*])\*([^\s*](?:[^*\n]*[^\s*])?)\*(?![\w*])/g;

/** Shows `text` in `container`. Blocks that are as they were keep their nodes, as only the end of a stream changes. */
export function renderMarkdown(container, text) {
  const sources = blocks(text);
  const old = [...container.children];
  sources.forEach((source, i) => {
    if (old[i]?.markdown === source) return;
    const node = block(source);
    node.markdown = source;
    if (old[i]) old[i].replaceWith(node);
    else container.append(node);
  });
  old.slice(sources.length).forEach((node) => node.remove());
}

/** The text cut into blocks: code, lists, headings, rules and paragraphs. */
function blocks(text) {
  const found = [];
  let lines = [];
  let kind = null;
  let fence = "";
  const end = () => {
    if (lines.length) found.push(lines.join("\n"));
    lines = [];
    kind = null;
  };
  for (const line of text.split("\n")) {
    if (kind === "code") {
      lines.push(line);
      if (line.trim().startsWith(fence) && !line.trim().slice(fence.length).replaceAll(fence[0], "")) end();
      continue;
    }
    const next = kindOf(line, kind);
    if (next !== kind || next === "heading" || next === "rule") end();
    kind = next;
    if (next !== "blank") lines.push(line);
    if (next === "code") fence = line.match(FENCE)[1];
  }
  end();
  return found;
}

function kindOf(line, before) {
  if (!line.trim()) return "blank";
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (ITEM.test(line) || (before === "list" && /^\s/.test(line))) return "list";
  return "paragraph";
}

function block(source) {
  const lines = source.split("\n");
  switch (kindOf(lines[0])) {
    case "code":
      return code(lines);
    case "heading":
      return element("h3", {}, ...inline(source.match(HEADING)[1]));
    case "rule":
      return element("hr");
    case "list":
      return list(lines);
    default:
      return element("p", {}, ...inline(source));
  }
}

function code(lines) {
  const fence = lines[0].match(FENCE)[1];
  const isClosed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
  const text = lines.slice(1, isClosed ? -1 : undefined).join("\n");
  return element("pre", { tabIndex: 0 }, element("code", {}, text)); // in the tab order: it scrolls sideways
}

/** Lists inside of lists by their indentation. */
function list(lines) {
  const open = []; // {indent, node} from the outermost list to the innermost
  for (const line of lines) {
    const match = line.match(ITEM);
    if (!match) {
      open.at(-1).node.lastChild.append("\n", ...inline(line.trim()));
      continue;
    }
    const indent = match[1].length;
    while (open.length > 1 && indent < open.at(-1).indent) open.pop();
    if (!open.length || indent > open.at(-1).indent + 1) {
      const node = element(/\d/.test(match[2]) ? "ol" : "ul");
      if (node.tagName === "OL") node.start = parseInt(match[2], 10);
      open.at(-1)?.node.lastChild.append(node);
      open.push({ indent, node });
    }
    open.at(-1).node.append(element("li", {}, ...inline(match[3])));
  }
  return open[0].node;
}

function inline(text) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    const [whole, code, bold, italic] = match;
    nodes.push(text.slice(at, match.index));
    if (code) nodes.push(element("code", {}, code));
    else nodes.push(element(bold ? "strong" : "em", {}, ...inline(bold ?? italic)));
    at = match.index + whole.length;
  }
  nodes.push(text.slice(at));
  return nodes.filter((node) => node !== "");
}
