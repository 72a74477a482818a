// What was said, and its form in the API. Knows no elements.
//
// A turn is the user's  {role: "user", text, media: [{kind, name, url, preview}]}
// or a reply, which holds the answers to its calls, too: see `newReply`.

export function newReply() {
  return {
    role: "assistant",
    state: "waiting", // then "streaming", and at last "done", "stopped" or "failed"
    thinking: "",
    content: "",
    calls: [], // {id, name, arguments (JSON text), result (text, null until it is answered)}
    problems: [], // {kind, message, raw}: what looked like a call and could not be read
    notes: [],
    finish: null,
    usage: null,
    error: null,
    startedAt: performance.now(),
    firstAt: null,
    isTimed: false, // whether the first to come was text; a call comes once it is whole
    endedAt: null,
  };
}

/** Adds a chunk of the stream to a reply. */
export function absorb(reply, chunk) {
  if (chunk.usage) reply.usage = chunk.usage;
  const choice = chunk.choices[0];
  if (!choice) return;
  const { delta } = choice;
  const text = (delta.reasoning_content ?? "") + (delta.content ?? "");
  if (text || delta.tool_calls) {
    reply.state = "streaming";
    if (!reply.firstAt) {
      reply.firstAt = performance.now();
      reply.isTimed = text !== "";
    }
  }
  reply.thinking += delta.reasoning_content ?? "";
  reply.content += delta.content ?? "";
  for (const { id, function: called } of delta.tool_calls ?? [])
    reply.calls.push({ id, ...called, result: null });
  reply.problems.push(...(delta.tool_problems ?? []));
  reply.notes.push(...(delta.notes ?? []));
  reply.finish = choice.finish_reason ?? reply.finish;
}

export const isOver = (reply) => !["waiting", "streaming"].includes(reply.state);

export const openCalls = (turn) => turn?.calls?.filter((call) => call.result === null) ?? [];

/** The turns as the API's messages. */
export function messages(turns, system) {
  const made = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) made.push(...(turn.role === "user" ? [asked(turn)] : replied(turn)));
  return made;
}

function asked({ text, media }) {
  if (!media.length) return { role: "user", content: text };
  const parts = media.map(({ kind, url }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url } }));
  if (text) parts.push({ type: "text", text });
  return { role: "user", content: parts };
}

function replied({ content, thinking, calls }) {
  if (!content && !calls.length) return []; // nothing came of it
  const message = { role: "assistant", content };
  if (thinking) message.reasoning_content = thinking;
  if (!calls.length) return [message];
  message.tool_calls = calls.map(({ id, name, arguments: given }) => ({
    id,
    type: "function",
    function: { name, arguments: given },
  }));
  return [
    message,
    ...calls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result })),
  ];
}

/** What a reply cost, as phrases. */
export function costs({ usage, startedAt, firstAt, endedAt, isTimed }) {
  const made = [];
  if (usage && isTimed && endedAt > firstAt && usage.completion_tokens > 1)
    made.push(`${short((usage.completion_tokens - 1) / ((endedAt - firstAt) / 1000))} tokens/s`);
  if (firstAt)
    made.push(`${isTimed ? "first token" : "call"} after ${short((firstAt - startedAt) / 1000)} s`);
  if (!usage) return made;
  const { cached_tokens: cached, ...media } = usage.prompt_tokens_details;
  const read = Object.entries(media)
    .filter(([, tokens]) => tokens)
    .map(([kind, tokens]) => `${kind.replace("_tokens", "")} ${tokens}`);
  if (cached) read.push(`cached ${cached}`);
  made.push(`prompt ${usage.prompt_tokens}${read.length ? ` (${read.join(", ")})` : ""}`);
  const thought = usage.completion_tokens_details.reasoning_tokens;
  made.push(`reply ${usage.completion_tokens}${thought ? ` (thinking ${thought})` : ""}`);
  return made;
}

const short = (value) => (value >= 10 ? value.toFixed(0) : value.toPrecision(2));
