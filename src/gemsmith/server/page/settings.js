// The settings: a panel, its fields, and what they mean in a request.

import { useKey } from "./api.js";
import { byId } from "./dom.js";

const EXAMPLE = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Get the current weather for a city.",
      parameters: {
        type: "object",
        properties: { city: { type: "string", description: "The city." } },
        required: ["city"],
      },
    },
  },
];
const KEPT = [
  "system",
  "max-tokens",
  "temperature",
  "think",
  "thinking-budget",
  "image-budget",
  "tools",
  "tool-choice",
];
const STORE = "gemsmith";
const narrow = matchMedia("(max-width: 55rem)");

const panel = byId("settings");
const form = byId("settings-form");
const toggle = byId("settings-toggle");
const rest = document.querySelectorAll(".skip, header, main");
const value = (id) => byId(id).value.trim();

/** onKey(): another key was given. */
export function startSettings(onKey) {
  recall();
  toggle.addEventListener("click", () => show(panel.hidden));
  byId("settings-close").addEventListener("click", () => show(false));
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation(); // elsewhere it stops the reply
    show(false);
  });
  narrow.addEventListener("change", cover);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", keep);
  byId("tools").addEventListener("input", checkTools);
  byId("tools-example").addEventListener("click", () => {
    byId("tools").value = JSON.stringify(EXAMPLE, null, 2);
    keep();
  });
  byId("key").addEventListener("change", () => {
    useKey(value("key"));
    stored("sessionStorage")?.setItem(STORE, value("key"));
    onKey();
  });
}

/** Opens the panel at a field. */
export function ask(id) {
  show(true);
  byId(id).focus();
}

/** The fields of a request, or null if one is wrong: the panel is open at it then. */
export function fields() {
  checkTools();
  const wrong = form.querySelector(":invalid:not(fieldset)");
  if (wrong) {
    show(true);
    wrong.reportValidity();
    return null;
  }
  const made = { tools: tools(), tool_choice: value("tool-choice") };
  if (!made.tools.length) delete made.tool_choice;
  if (value("max-tokens")) made.max_tokens = Number(value("max-tokens"));
  if (value("temperature")) made.temperature = Number(value("temperature"));
  if (value("think")) {
    if (value("thinking-budget")) made.thinking_budget = Number(value("thinking-budget"));
    else made.reasoning_effort = "max";
  }
  const budget = value("image-budget");
  if (budget) made.mm_budget = budget === "auto" ? budget : Number(budget);
  return made;
}

export const systemPrompt = () => value("system");

function show(open) {
  panel.hidden = !open;
  toggle.setAttribute("aria-expanded", open);
  cover();
  (open ? byId("settings-close") : toggle).focus();
}

/** Where the panel covers the rest, the rest cannot be reached. */
function cover() {
  for (const element of rest) element.inert = narrow.matches && !panel.hidden;
}

/** The declared tools: a list, one tool, or bare functions. */
function tools() {
  const given = value("tools") ? JSON.parse(value("tools")) : [];
  return (Array.isArray(given) ? given : [given]).map((tool) =>
    tool?.function ? tool : { type: "function", function: tool },
  );
}

function checkTools() {
  let problem = "";
  try {
    const named = tools().every((tool) => typeof tool.function?.name === "string");
    if (!named) problem = "Every tool needs a name.";
  } catch (error) {
    problem = `This is not JSON: ${error.message}`;
  }
  byId("tools").setCustomValidity(problem);
  byId("tools").setAttribute("aria-invalid", problem !== "");
  byId("tools-problem").textContent = problem;
}

function keep() {
  checkTools();
  byId("thinking-budget").disabled = !value("think");
  const values = Object.fromEntries(KEPT.map((id) => [id, byId(id).value]));
  stored("localStorage")?.setItem(STORE, JSON.stringify(values));
}

function recall() {
  byId("key").value = stored("sessionStorage")?.getItem(STORE) ?? "";
  useKey(value("key"));
  let kept = {};
  try {
    kept = JSON.parse(stored("localStorage")?.getItem(STORE) ?? "{}") ?? {};
  } catch {
    // Somebody else wrote it.
  }
  for (const id of KEPT) if (typeof kept[id] === "string") byId(id).value = kept[id];
  for (const select of form.querySelectorAll("select"))
    if (select.selectedIndex < 0) select.selectedIndex = 0;
  keep();
}

/** The browser's storage, or null where the user has turned it off. */
function stored(kind) {
  try {
    return window[kind];
  } catch {
    return null;
  }
}
