// Markdown as elements. marked reads it, this makes the elements: HTML in it stays text, pictures
// become links, and links lead to the web or a mailbox alone.

import { lexer } from "./vendor/marked.esm.js";
import { copyButton, h } from "./dom.js";

const LINKS = ["http:", "https:", "mailto:"];
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

/** Markdown that grows: blocks that stay as they were are not drawn again. */
export class Markdown {
  constructor(root) {
    this.root = root;
    this.drawn = []; // the Markdown of each child of the root
  }

  update(text) {
    const blocks = read(text).filter(({ type }) => type !== "space" && type !== "def");
    let same = 0;
    while (same < this.drawn.length && blocks[same]?.raw === this.drawn[same]) same++;
    while (this.root.childNodes.length > same) this.root.lastChild.remove();
    this.root.append(...blocks.slice(same).map(block));
    this.drawn = blocks.map(({ raw }) => raw);
  }
}

function read(text) {
  try {
    return lexer(text);
  } catch {
    return [{ type: "html", raw: text, text }]; // nested too deeply
  }
}

function block(token) {
  switch (token.type) {
    case "heading":
      // The page's own headings are of the levels 1 and 2.
      return h(`h${Math.min(token.depth + 2, 6)}`, {}, ...inline(token.tokens));
    case "paragraph":
      return h("p", {}, ...inline(token.tokens));
    case "text":
      return h("span", {}, ...(token.tokens ? inline(token.tokens) : [token.text]));
    case "code":
      return code(token);
    case "blockquote":
      return h("blockquote", {}, ...token.tokens.filter(isShown).map(block));
    case "list": {
      const start = token.ordered && token.start !== 1 ? token.start : null;
      const items = token.items.map(({ tokens }) =>
        h("li", {}, ...tokens.filter(isShown).map(block)),
      );
      return h(token.ordered ? "ol" : "ul", { start }, ...items);
    }
    case "checkbox":
      return document.createTextNode(token.checked ? "☑ " : "☐ ");
    case "table":
      return table(token);
    case "hr":
      return h("hr");
    default:
      return h("p", { class: "raw" }, token.text ?? token.raw);
  }
}

const isShown = ({ type }) => type !== "space" && type !== "def";

function code({ text, lang }) {
  const bar = h(
    "div",
    { class: "bar" },
    h("span", {}, lang ?? ""),
    copyButton(() => text),
  );
  return h("div", { class: "code-block" }, bar, h("pre", { tabindex: 0 }, h("code", {}, text)));
}

function table({ header, rows }) {
  const row = (cells, tag) =>
    h(
      "tr",
      {},
      ...cells.map(({ tokens, align }) =>
        h(tag, { class: align && `to-${align}` }, ...inline(tokens)),
      ),
    );
  const head = h("thead", {}, row(header, "th"));
  const body = h("tbody", {}, ...rows.map((cells) => row(cells, "td")));
  return h("div", { class: "table", tabindex: 0 }, h("table", {}, head, body));
}

function inline(tokens) {
  return tokens.map((token) => {
    switch (token.type) {
      case "strong":
      case "em":
      case "del":
        return h(token.type, {}, ...inline(token.tokens));
      case "codespan":
        return h("code", {}, token.text);
      case "br":
        return h("br");
      case "link":
        return link(token.href, inline(token.tokens));
      case "image":
        return link(token.href, [token.text || token.href]);
      case "html":
        return /^<br ?\/?>$/i.test(token.raw) ? h("br") : token.raw;
      case "text":
        return token.tokens ? h("span", {}, ...inline(token.tokens)) : unescaped(token.text);
      default:
        return token.text ?? token.raw;
    }
  });
}

function link(href, children) {
  const isSafe = URL.canParse(href) && LINKS.includes(new URL(href).protocol);
  if (!isSafe) return h("span", {}, ...children);
  return h("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

function unescaped(text) {
  return text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|(\w+));/gi, (whole, decimal, hex, name) => {
    if (name) return ENTITIES[name] ?? whole;
    const number = decimal ? Number(decimal) : parseInt(hex, 16);
    return number <= 0x10ffff ? String.fromCodePoint(number) : whole;
  });
}
