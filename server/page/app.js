// The page: one conversation, in memory only, and what the user does with it.

import { ApiError, apiKey, getModel, streamChat } from "./api.js";
import { Answer } from "./answer.js";
import { byId, element, submitOnEnter } from "./dom.js";
import { aboutModel, examplesFor } from "./examples.js";
import { requestFields, setTools, setUpSettings, settingsAreValid, systemMessages } from "./settings.js";
import { AnswerView, userTurn } from "./view.js";

const RETRY_MS = 1000;
const conversation = byId("conversation");
const message = byId("message");
const status = byId("status");

const entries = []; // {messages, node}: a question, an answer (failed ones have no messages) or tools' results (no node)
let model = null;
let running = null; // the AbortController of the answer that is being written

// Connecting

/** Waits until the server serves a model, and says meanwhile what it does. */
async function connect(signal) {
  for (;;) {
    try {
      model = await getModel(signal);
      showModel();
      return;
    } catch (error) {
      if (signal?.aborted) throw error;
      if (error.status === 401) await askForKey(error.message);
      else await pause(`${error.message} Trying again…`, signal);
    }
  }
}

async function pause(reason, signal) {
  status.textContent = reason;
  await new Promise((resolve) => {
    setTimeout(resolve, RETRY_MS);
    signal?.addEventListener("abort", resolve);
  });
  signal?.throwIfAborted();
}

function showModel() {
  status.textContent = "";
  const length = model.max_model_len;
  byId("model").textContent = length ? `${model.id} · ${length.toLocaleString("en")} tokens` : model.id;
  document.title = `${model.id} · qjax`;
  byId("about").textContent = aboutModel(model);
  if (!byId("examples").childElementCount) byId("examples").append(...examplesFor(model).map(exampleItem));
}

function exampleItem({ text, tools, note }) {
  const button = element("button", { type: "button" }, text);
  if (note) button.append(" ", element("small", {}, note));
  button.addEventListener("click", () => {
    if (tools) setTools(tools);
    say(text);
  });
  return element("li", {}, button);
}

/** Resolves once a key was entered. Throws if the user would not. */
function askForKey(reason) {
  const dialog = byId("key-dialog");
  byId("key-reason").textContent = apiKey.get() === null ? "This server asks for a key." : reason;
  status.textContent = "";
  byId("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.onclose = () => {
      const key = byId("key").value.trim();
      byId("key").value = "";
      message.focus();
      if (dialog.returnValue !== "use" || !key) return reject(new ApiError(401, "The server needs an API key."));
      apiKey.set(key);
      resolve();
    };
  });
}

// The conversation

function say(text) {
  if (running || !text.trim() || !settingsAreValid()) return false;
  byId("welcome").hidden = true;
  byId("new-chat").hidden = false;
  entries.push({ messages: [{ role: "user", content: text }], node: append(userTurn(text, editLast)) });
  ask();
  return true;
}

function sendResults(calls, texts) {
  if (running || !settingsAreValid()) return false;
  entries.push({ messages: calls.map(({ id }, i) => ({ role: "tool", tool_call_id: id, content: texts[i] })) });
  message.focus();
  ask();
  return true;
}

/** Has the model answer what was said so far. */
async function ask() {
  const messages = [...systemMessages(), ...entries.flatMap((entry) => entry.messages)];
  const body = { model: model?.id, messages, ...requestFields() };
  const answer = new Answer();
  const view = new AnswerView(answer, {
    onRegenerate: regenerate,
    onResults: (texts) => sendResults(answer.toolCalls, texts),
  });
  const entry = { messages: [], node: append(view.node) };
  entries.push(entry);
  const { signal } = setRunning(new AbortController());
  try {
    await receive(body, answer, view, signal);
    keepAtEnd(() => view.finish());
  } catch (error) {
    if (signal.aborted) keepAtEnd(() => view.finish("You stopped the answer."));
    else keepAtEnd(() => view.fail(error.message, regenerate));
    if (!(error instanceof ApiError || signal.aborted)) console.error(error);
  }
  entry.messages = answer.messages;
  setRunning(null);
  status.textContent = "";
  if (answer.wantsResults && !message.value) view.node.querySelector(".results textarea").focus();
}

/** Streams the answer. Until it has begun, a missing key and a server that is not ready are no failures. */
async function receive(body, answer, view, signal) {
  for (;;) {
    try {
      for await (const chunk of streamChat(body, signal)) {
        answer.add(chunk);
        keepAtEnd((scroll) => view.draw(scroll));
      }
      return;
    } catch (error) {
      if (signal.aborted || answer.hasBegun) throw error;
      if (error.status === 401) await askForKey(error.message);
      else if (error.status === 503) {
        await pause(`${error.message} Trying again…`, signal);
        await connect(signal);
      } else throw error;
    }
  }
}

function regenerate() {
  if (running || !settingsAreValid()) return;
  entries.pop().node.remove();
  ask();
}

/** Takes the last question back into the composer, and what followed it away. */
function editLast() {
  if (running) return;
  for (;;) {
    const { messages, node } = entries.pop();
    node?.remove();
    if (messages[0]?.role !== "user") continue;
    message.value = messages[0].content;
    message.focus();
    return;
  }
}

function newChat() {
  running?.abort();
  entries.length = 0;
  conversation.replaceChildren();
  byId("welcome").hidden = false;
  byId("new-chat").hidden = true;
  message.focus();
}

// The page

function setRunning(controller) {
  running = controller;
  conversation.ariaBusy = String(running !== null); // screen readers read the answer once it is whole
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  if (hadFocus) (running ? byId("stop") : message).focus();
  return running;
}

function append(node) {
  conversation.append(node);
  window.scrollTo(0, document.documentElement.scrollHeight);
  return node;
}

/** Changes the page; if its end was in sight, it stays in sight. */
function keepAtEnd(change) {
  const page = document.documentElement;
  const isAtEnd = page.scrollHeight - page.clientHeight - page.scrollTop < 40;
  const scroll = () => isAtEnd && window.scrollTo(0, page.scrollHeight);
  change(scroll);
  scroll();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (say(message.value)) message.value = "";
});
submitOnEnter(message);
byId("stop").addEventListener("click", () => running?.abort());
byId("new-chat").addEventListener("click", newChat);
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close(""));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) running?.abort();
});
setUpSettings();
connect().catch((error) => (status.textContent = error.message));
