// The server's API: the same one that any other client uses.

let key = "";

export function useKey(given) {
  key = given;
}

/** What the server, or the way to it, refused. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new ApiError(
    body?.error?.message ?? `${answer.status} ${answer.statusText}`,
    answer.status,
  );
}

/** The model that is served: `id`, `modalities`, `max_model_len`. */
export async function model() {
  const { data } = await (await request("v1/models")).json();
  return data[0];
}

/** Bytes that the server holds: `weights`, `kv`, `kvUsed`, and `process` where it is known. */
export async function memory() {
  const text = await (await request("metrics")).text();
  const value = (name) => {
    const found = text.match(new RegExp(`^${name}(?:\\{.*\\})? (\\S+)$`, "m"));
    return found && Number(found[1]);
  };
  return {
    weights: value("gemsmith:weights_bytes"),
    kv: value("gemsmith:kv_bytes"),
    kvUsed: value("gemsmith:kv_used_bytes"),
    process: value("process_resident_memory_bytes"),
  };
}

/** The chunks of a streamed chat completion. */
export async function* complete(body, signal) {
  const answer = await request("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    yield chunk;
  }
  throw new ApiError("The connection broke off before the end of the reply.");
}

/** The data of server-sent events; comments, such as pings, are passed over. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const whole = (rest + value).split("\n\n");
      rest = whole.pop();
      for (const event of whole) if (event.startsWith("data: ")) yield event.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection broke off before the end of the reply.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
