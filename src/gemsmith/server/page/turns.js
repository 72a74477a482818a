// Turns of the conversation as elements.

import { drawn, places } from "./boxes.js";
import { costs, isOver, openCalls } from "./conversation.js";
import { copyButton, h, sendOnEnter } from "./dom.js";
import { Markdown } from "./markdown.js";

const PREVIEWS = {
  image: ({ preview, name }) => h("img", { src: preview, alt: name }),
  audio: ({ preview, name }) => h("audio", { src: preview, controls: true, "aria-label": name }),
  video: ({ preview, name }) => h("video", { src: preview, controls: true, "aria-label": name }),
};

/** A medium that was attached. */
export const preview = (medium) => PREVIEWS[medium.kind](medium);

/** What the user said. */
export function userTurn({ text, media }) {
  return h(
    "article",
    { class: "turn user" },
    h("h2", { class: "visually-hidden" }, "You"),
    media.length ? h("div", { class: "media" }, ...media.map(preview)) : null,
    text ? h("p", {}, text) : null,
  );
}

/** A reply while it comes, and what can be done with it once it is there. */
export class ReplyView {
  /**
   * pictures: those of the user's last message that had any, or undefined.
   * mayAsk(): whether a reply can be asked for now. onRetry(): the reply is to be made anew.
   * onEdit(): the question is to be changed; null if there is none right before.
   * onAnswered(): every call has its result now.
   */
  constructor(reply, { name, pictures, mayAsk, onRetry, onEdit, onAnswered }) {
    Object.assign(this, { reply, pictures, mayAsk, onAnswered, frame: 0 });
    this.summary = h("summary");
    this.thoughts = h("div", { class: "thoughts" });
    this.thinking = h("details", { class: "thinking", hidden: true }, this.summary, this.thoughts);
    this.waiting = h("p", { class: "waiting" }, h("span"), h("span"), h("span"));
    this.content = h("div", { class: "content" });
    this.markdown = new Markdown(this.content);
    this.calls = h("form", { class: "calls", novalidate: true, onsubmit: (e) => this.answer(e) });
    this.extra = h("div"); // what is known at the end: places, problems, notes, an error
    this.facts = h("span");
    const button = (text, onclick) =>
      h("button", { type: "button", class: "quiet last", onclick }, text);
    this.copy = copyButton(() => reply.content);
    const buttons = [this.copy, button("Retry", onRetry), onEdit && button("Edit", onEdit)];
    this.bar = h("footer", { hidden: true }, this.facts, ...buttons);
    this.root = h(
      "article",
      { class: "turn reply", "aria-busy": "true" },
      h("h2", { class: "visually-hidden" }, name),
      this.thinking,
      this.content,
      this.waiting,
      this.calls,
      this.extra,
      this.bar,
    );
  }

  /** Have it drawn with the next frame; `done` runs after that. */
  soon(done) {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
      done();
    });
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { reply } = this;
    const over = isOver(reply);
    const isThinking = !over && !reply.content && !reply.calls.length;
    this.thinking.hidden = !reply.thinking;
    this.summary.textContent = isThinking ? "Thinking …" : "Thoughts";
    this.thoughts.textContent = reply.thinking;
    this.waiting.hidden = over;
    this.markdown.update(reply.content);
    for (const call of reply.calls.slice(this.calls.children.length))
      this.calls.append(callCard(call));
    if (over) this.end();
  }

  end() {
    const { reply, pictures } = this;
    this.root.removeAttribute("aria-busy");
    const found = pictures ? places(reply.content) : [];
    if (openCalls(reply).length)
      this.calls.append(h("button", { class: "primary" }, "Send results"));
    this.extra.append(
      ...(found.length ? [drawn(pictures, found)] : []),
      ...reply.problems.map(problemCard),
      ...reply.notes.map((note) => h("p", { class: "note" }, note)),
    );
    if (reply.error) this.extra.append(h("p", { class: "error", role: "alert" }, reply.error));
    const ends = { stopped: "stopped", failed: "failed" }[reply.state];
    const reason = ends ?? (reply.finish === "length" ? "cut off: no tokens left" : null);
    this.facts.textContent = [...(reason ? [reason] : []), ...costs(reply)].join(" · ");
    this.copy.hidden = !reply.content;
    this.bar.hidden = false;
  }

  answer(event) {
    event.preventDefault();
    if (!this.calls.reportValidity() || !this.mayAsk()) return;
    const boxes = [...this.calls.querySelectorAll("textarea")];
    this.reply.calls.forEach((call, place) => (call.result = boxes[place].value));
    this.calls.replaceChildren(...this.reply.calls.map(callCard));
    this.onAnswered();
  }
}

/** A call, with its result or a box to write it in. */
function callCard(call) {
  const { name, result } = call;
  const box = h("textarea", {
    rows: 2,
    required: true,
    class: "code",
    "aria-label": `Result of ${name}`,
  });
  const answer =
    result === null
      ? h("label", {}, "Result", box)
      : h("div", {}, h("span", { class: "of" }, "Result"), h("pre", { tabindex: 0 }, result));
  const head = h("p", {}, h("span", { class: "of" }, "calls"), " ", h("code", {}, name));
  const card = h(
    "div",
    { class: "call" },
    head,
    h("pre", { tabindex: 0 }, pretty(call.arguments)),
    answer,
  );
  if (result === null) sendOnEnter(box);
  return card;
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

function problemCard({ kind, message, raw }) {
  const text = raw ? h("pre", { tabindex: 0 }, raw) : null;
  return h(
    "div",
    { class: "tool-problem" },
    h("p", {}, `A call that cannot be made (${kind}): ${message}`),
    text,
  );
}
