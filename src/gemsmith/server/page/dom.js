// Elements from code. Text is always text here; nothing is ever parsed as HTML.

/**
 * An element with children. props: a function is a listener ("onclick"), `true` an attribute
 * without a value; null, undefined and false leave it out.
 */
export function h(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false)
      made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** A button that copies what `text()` gives, and says that it did. */
export function copyButton(text) {
  const made = h("button", { type: "button", class: "quiet", onclick: copy }, "Copy");
  async function copy() {
    made.textContent = (await copied(text())) ? "Copied" : "Could not copy";
    setTimeout(() => (made.textContent = "Copy"), 1500);
  }
  return made;
}

async function copied(text) {
  // Browsers have no clipboard for pages over plain HTTP, but those of this machine.
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // It was not allowed; the old way may be.
    }
  }
  const holder = h("textarea", { class: "visually-hidden", readonly: true });
  holder.value = text;
  const focused = document.activeElement;
  document.body.append(holder);
  holder.select();
  const done = document.execCommand("copy");
  holder.remove();
  focused?.focus();
  return done;
}

/** Has a text box send its form with Enter; Shift and Enter make a new line. */
export function sendOnEnter(box) {
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    box.form.requestSubmit();
  });
}
