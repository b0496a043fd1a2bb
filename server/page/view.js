// What a turn of the conversation looks like. Holds nodes; what is said is in `Answer`.

import { element, submitOnEnter } from "./dom.js";
import { renderMarkdown } from "./markdown.js";

const ENDINGS = {
  length: "The answer reached the limit of tokens.",
  abort: "The server ended the answer.",
};

export function userTurn(text, onEdit) {
  const edit = button("Edit", onEdit);
  const bubble = element("p", { className: "bubble" }, text);
  return element("article", { className: "turn user", ariaLabel: "You" }, actions(edit), bubble);
}

/** An answer's node, drawn at most once a frame. */
export class AnswerView {
  #answer;
  #frame = null;
  #isDone = false;
  #wasToggled = false; // by the user: then it stays as it is

  /** `onResults` gets the text of each tool's result, in the order of the calls. */
  constructor(answer, { onRegenerate, onResults }) {
    this.#answer = answer;
    this.onResults = onResults;
    this.waiting = element("p", { className: "waiting", role: "img", ariaLabel: "Waiting for the answer" });
    this.summary = element("summary");
    this.reasoning = element("p", { className: "reasoning" });
    this.thinking = element("details", { hidden: true }, this.summary, this.reasoning);
    this.summary.addEventListener("click", () => (this.#wasToggled = true));
    this.content = element("div", { className: "content" });
    this.calls = element("div", { className: "calls" });
    this.end = element("p", { className: "note" });
    this.stats = element("span", { className: "stats" });
    this.copy = copyButton(answer);
    this.actions = actions(this.stats, this.copy, button("Regenerate", onRegenerate));
    this.node = element(
      "article",
      { className: "turn assistant", ariaLabel: "Answer" },
      ...[this.waiting, this.thinking, this.content, this.calls, this.end, this.actions],
    );
  }

  /** Shows the answer as it is by the next frame; `afterwards` runs then. */
  draw(afterwards = () => {}) {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      this.#show();
      afterwards();
    });
  }

  /** The last drawing. `ending` is why the answer ended, where the answer itself does not say it. */
  finish(ending = "") {
    cancelAnimationFrame(this.#frame);
    this.#isDone = true;
    this.#show();
    this.end.textContent = ending || ENDINGS[this.#answer.finishReason] || (this.#answer.hasBegun ? "" : "The answer is empty.");
    if (this.#answer.wantsResults) this.calls.after(this.#resultsForm());
  }

  fail(message, onRetry) {
    this.finish(" ");
    this.end.remove();
    const error = element("p", { className: "error", role: "alert" }, message);
    this.actions.replaceWith(error, button("Try again", onRetry, "retry"));
  }

  #show() {
    const answer = this.#answer;
    this.waiting.hidden = this.#isDone || answer.hasBegun;
    this.thinking.hidden = !answer.reasoning;
    this.summary.textContent = this.#thinkingTitle();
    this.reasoning.textContent = answer.reasoning;
    if (!this.#wasToggled) this.thinking.open = !this.#isDone && !answer.hasAnswered;
    renderMarkdown(this.content, answer.content);
    this.calls.replaceChildren(...answer.toolCalls.map(callNode));
    this.copy.hidden = !answer.content || !navigator.clipboard; // browsers have it for https and localhost alone
    this.stats.textContent = statistics(answer);
  }

  #thinkingTitle() {
    const { hasAnswered, thinkingSeconds, numReasoningTokens } = this.#answer;
    const amount = `${seconds(thinkingSeconds)} · ${count(numReasoningTokens)}`;
    return this.#isDone || hasAnswered ? `Thought for ${amount}` : `Thinking… ${amount}`;
  }

  #resultsForm() {
    const fields = this.#answer.toolCalls.map((call) => {
      const field = element("textarea", { rows: 1, required: true, placeholder: "Text or JSON" });
      submitOnEnter(field);
      return element("label", {}, `Result of ${call.function.name}`, field);
    });
    const send = element("button", {}, fields.length > 1 ? "Send results" : "Send result");
    const form = element("form", { className: "results" }, ...fields, send);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const texts = [...form.querySelectorAll("textarea")];
      if (!this.onResults(texts.map((text) => text.value))) return;
      texts.forEach((text) => (text.readOnly = true));
      send.remove();
    });
    return form;
  }
}

function callNode({ function: { name, arguments: text } }) {
  const title = element("p", {}, "Calls ", element("code", {}, name));
  return element("section", { className: "call" }, title, element("pre", { tabIndex: 0 }, indented(text)));
}

/** The arguments on lines of their own, once they are whole. */
function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

function statistics(answer) {
  if (!answer.numTokens) return "";
  const rate = answer.tokensPerSecond;
  const speed = rate === null ? "" : ` · ${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`;
  return `${count(answer.numTokens)}${speed} · first after ${seconds(answer.secondsToFirst)}`;
}

const seconds = (value) => (value < 60 ? `${value.toFixed(1)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`);
const count = (tokens) => `${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`;

function actions(...children) {
  return element("div", { className: "actions" }, ...children);
}

function button(label, onClick, className = "") {
  const node = element("button", { type: "button", className }, label);
  node.addEventListener("click", onClick);
  return node;
}

function copyButton(answer) {
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(answer.content);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  return copy;
}
