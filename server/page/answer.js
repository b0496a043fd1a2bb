// One answer as data: what was streamed so far, and how fast. Knows nothing of the page.

export class Answer {
  reasoning = "";
  content = "";
  toolCalls = []; // OpenAI's: {id, type, function: {name, arguments}}
  finishReason = null;
  numTokens = 0;
  numReasoningTokens = 0;

  #asked = performance.now();
  #first = null; // {time, numTokens} of the first chunk with tokens
  #last = null;
  #reasoned = null; // when the first token after the reasoning came

  add(chunk, time = performance.now()) {
    if (chunk.usage) {
      this.numTokens = chunk.usage.completion_tokens;
      this.numReasoningTokens = chunk.usage.completion_tokens_details?.reasoning_tokens ?? 0;
    }
    const choice = chunk.choices[0];
    if (!choice) return;
    if (this.numTokens > 0) {
      this.#last = { time, numTokens: this.numTokens };
      this.#first ??= this.#last;
    }
    const { reasoning, reasoning_content, content, tool_calls } = choice.delta;
    this.reasoning += reasoning ?? reasoning_content ?? "";
    this.content += content ?? "";
    for (const { index, ...call } of tool_calls ?? []) this.#addCall(index, call);
    if (this.#reasoned === null && this.hasAnswered) this.#reasoned = time;
    this.finishReason = choice.finish_reason ?? this.finishReason;
  }

  #addCall(index, { id, function: { name, arguments: text } }) {
    this.toolCalls[index] ??= { id, type: "function", function: { name: "", arguments: "" } };
    const call = this.toolCalls[index].function;
    call.name += name ?? "";
    call.arguments += text ?? "";
  }

  get hasBegun() {
    return this.reasoning !== "" || this.hasAnswered;
  }

  get hasAnswered() {
    return this.content !== "" || this.toolCalls.length > 0;
  }

  /** Whole calls, which want results: a call that was cut off has no valid arguments. */
  get wantsResults() {
    return this.finishReason === "tool_calls";
  }

  get thinkingSeconds() {
    const end = this.#reasoned ?? this.#last?.time ?? this.#asked;
    return (end - (this.#first?.time ?? end)) / 1000;
  }

  get secondsToFirst() {
    return this.#first && (this.#first.time - this.#asked) / 1000;
  }

  /** After the first token, whose time is that of reading the prompt. Null while too little was written to tell. */
  get tokensPerSecond() {
    const seconds = this.#first ? (this.#last.time - this.#first.time) / 1000 : 0;
    return seconds > 0.05 ? (this.#last.numTokens - this.#first.numTokens) / seconds : null;
  }

  /** The messages that the conversation goes on with: none where nothing was written. */
  get messages() {
    if (!this.hasBegun) return [];
    const message = { role: "assistant", content: this.content };
    if (this.reasoning) message.reasoning = this.reasoning;
    if (this.wantsResults) message.tool_calls = this.toolCalls;
    return [message];
  }
}
