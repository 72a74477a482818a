// The page: a conversation with the model that the server serves.

import * as api from "./api.js";
import { absorb, messages, newReply, openCalls } from "./conversation.js";
import { byId, sendOnEnter } from "./dom.js";
import * as settings from "./settings.js";
import { release, Tray } from "./tray.js";
import { ReplyView, userTurn } from "./turns.js";

const log = byId("log");
const turns = byId("turns");
const input = byId("input");
const tray = new Tray(say);

let conversation = [];
let model = null;
let running = null; // the AbortController of the reply that is coming

// -- asking -----------------------------------------------------------------------------------

async function send() {
  const media = await tray.whole();
  const text = input.value.trim();
  if (running || (!text && !media.length)) return;
  if (openCalls(conversation.at(-1)).length) {
    say("The model waits for the results of its calls: write them above, or retry.");
    return;
  }
  if (!model && !(await connect())) return;
  if (!mayAsk()) return;
  const turn = { role: "user", text, media };
  conversation.push(turn);
  turns.append(userTurn(turn));
  write("", []);
  await reply();
}

/** Whether a reply can be asked for: none is coming, and the settings are right, or are shown. */
const mayAsk = () => !running && settings.fields() !== null;

/** Has the model reply to what was said so far. */
async function reply() {
  const made = newReply();
  const history = messages(conversation, settings.systemPrompt());
  const asked = { model: model.id, messages: history, ...settings.fields() };
  const pictures = conversation
    .map(({ media }) => (media ?? []).filter(({ kind }) => kind === "image"))
    .findLast(({ length }) => length);
  const canEdit = conversation.at(-1).role === "user";
  const view = new ReplyView(made, {
    name: model.id,
    pictures,
    mayAsk,
    onRetry: retry,
    onEdit: canEdit ? edit : null,
    onAnswered: reply,
  });
  conversation.push(made);
  turns.append(view.root);
  follow(true);
  const { signal } = setRunning(new AbortController());
  try {
    for await (const chunk of api.complete(asked, signal)) {
      absorb(made, chunk);
      const atEnd = isAtEnd();
      view.soon(() => follow(atEnd));
    }
    made.state = "done";
  } catch (error) {
    made.state = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) made.error = error.message;
    if (error.status === 401) settings.ask("key");
  }
  made.endedAt = performance.now();
  const atEnd = isAtEnd();
  view.draw();
  follow(atEnd);
  if (!conversation.includes(made)) return; // a new chat began meanwhile
  setRunning(null);
  announce(made);
  await showMemory();
}

function retry() {
  if (!mayAsk()) return;
  takeBack();
  input.focus();
  reply();
}

/** Puts what was asked last back into the message box. */
function edit() {
  takeBack();
  const { text, media } = takeBack();
  write(text, media);
  input.focus();
}

/** Takes the last turn away. */
function takeBack() {
  turns.lastElementChild.remove();
  return conversation.pop();
}

/** Sets what is going to be sent. */
function write(text, media) {
  input.value = text;
  fit();
  tray.put(media);
}

function startAnew() {
  running?.abort();
  setRunning(null);
  release(conversation.flatMap(({ media }) => media ?? []));
  conversation = [];
  turns.replaceChildren();
  say("");
  input.focus();
}

// -- showing ----------------------------------------------------------------------------------

function setRunning(controller) {
  running = controller;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  if (running) say("");
  return running;
}

function say(text) {
  byId("notice").textContent = text;
}

/** Tells readers of the screen what came, once it is whole. */
function announce({ state, content, calls }) {
  const called = calls.map(
    ({ name }) => `The model calls ${name}. Its result is asked for below the call.`,
  );
  const end = state === "stopped" ? ["Stopped."] : []; // a failure is an alert by itself
  byId("announcer").textContent = [content, ...called, ...end].join(" ");
}

const isAtEnd = (height = log.clientHeight) => log.scrollHeight - log.scrollTop - height < 60;

/** Keeps the end in sight, if it was. */
function follow(wasAtEnd) {
  if (wasAtEnd) log.scrollTop = log.scrollHeight;
}

// What is attached, or a long message, takes its room from the conversation: its end stays in sight.
let heightBefore = log.clientHeight;
new ResizeObserver(() => {
  follow(isAtEnd(heightBefore));
  heightBefore = log.clientHeight;
}).observe(log);

/** As high as its text; the style sheet bounds it. */
function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

async function showMemory() {
  try {
    const { weights, kv, kvUsed, process } = await api.memory();
    const held = [`weights ${bytes(weights)}`, `K/V ${bytes(kvUsed)} of ${bytes(kv)}`];
    if (process) held.push(`process ${bytes(process)}`);
    byId("memory").textContent = `memory: ${held.join(" · ")}`;
  } catch {
    byId("memory").textContent = "";
  }
}

function bytes(count) {
  const [unit, size] = count >= 2 ** 30 ? ["GiB", 2 ** 30] : ["MiB", 2 ** 20];
  return `${(count / size).toFixed(1)} ${unit}`;
}

// -- starting ---------------------------------------------------------------------------------

/** Asks the server what it serves; whether it said so. */
async function connect() {
  try {
    model = await api.model();
  } catch (error) {
    model = null;
    say(
      error.status === 401
        ? "This server asks for an API key: give one in the settings."
        : error.message,
    );
    if (error.status === 401) settings.ask("key");
    return false;
  }
  byId("model").textContent = model.id;
  document.title = `${model.id} · gemsmith`;
  tray.offer(model);
  say("");
  await showMemory();
  return true;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", () => {
  running?.abort();
  input.focus();
});
byId("new-chat").addEventListener("click", startAnew);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented) running?.abort();
});
input.addEventListener("input", fit);
sendOnEnter(input);
settings.startSettings(connect);
if (await connect()) input.focus();
