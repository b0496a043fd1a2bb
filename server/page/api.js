// The server's public API: the list of models, and chats as streams. Knows nothing of the page.

const KEY = "qjax-api-key"; // in sessionStorage: gone when the tab is closed

export const apiKey = {
  get: () => sessionStorage.getItem(KEY),
  set: (key) => sessionStorage.setItem(KEY, key),
  forget: () => sessionStorage.removeItem(KEY),
};

/** What the server refused or failed at. `status` is HTTP's, 0 where the server did not answer. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The served model: {id, root, max_model_len}. */
export async function getModel(signal) {
  const response = await request("v1/models", { signal });
  return (await response.json()).data[0];
}

/** Yields the chunks of a chat. Aborting the signal closes the connection, and so ends the request on the server. */
export async function* streamChat(body, signal) {
  const options = { include_usage: true, continuous_usage_stats: true };
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: options }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.code, chunk.error.message);
    yield chunk;
  }
  throw new ApiError(0, "The connection ended before the answer did.");
}

async function request(path, options) {
  const key = apiKey.get();
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(0, "The server does not answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error?.message ?? `The server answered with status ${response.status}.`);
}

/** The data of each server-sent event. The server writes an event as one `data:` line. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) yield part.slice(6);
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(0, "The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
