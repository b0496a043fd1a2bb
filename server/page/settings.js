// The settings dialog: what it says becomes fields of the request.

import { apiKey } from "./api.js";
import { byId } from "./dom.js";

const dialog = byId("settings");
const form = dialog.querySelector("form");
const { system, thinking, tools } = form.elements;
const forget = byId("forget-key");

export function setUpSettings() {
  byId("open-settings").addEventListener("click", openSettings);
  tools.addEventListener("input", checkTools);
  forget.addEventListener("click", () => {
    apiKey.forget();
    forget.hidden = true;
  });
}

export function openSettings() {
  forget.hidden = apiKey.get() === null;
  dialog.showModal();
}

/** Whether all fields are valid; if not, the dialog opens and names the first that is not. */
export function settingsAreValid() {
  if (form.checkValidity()) return true;
  openSettings();
  form.reportValidity();
  return false;
}

export function setTools(list) {
  tools.value = JSON.stringify(list, null, 2);
  checkTools();
}

/** The fields of a chat request; one that was left empty is absent. */
export function requestFields() {
  const fields = {};
  for (const name of ["temperature", "top_p", "top_k", "max_tokens"]) {
    if (form.elements[name].value !== "") fields[name] = form.elements[name].valueAsNumber;
  }
  if (thinking.value !== "auto") fields.chat_template_kwargs = { enable_thinking: thinking.value === "on" };
  if (tools.value.trim()) fields.tools = JSON.parse(tools.value);
  return fields;
}

export function systemMessages() {
  return system.value.trim() ? [{ role: "system", content: system.value }] : [];
}

function checkTools() {
  const mistake = mistakeIn(tools.value);
  tools.setCustomValidity(mistake);
  tools.ariaInvalid = mistake ? "true" : "false";
  byId("tools-error").textContent = mistake;
  const { length } = mistake || !tools.value.trim() ? [] : JSON.parse(tools.value);
  byId("num-tools").textContent = length ? ` · ${length} ${length === 1 ? "tool" : "tools"}` : "";
}

/** What is wrong with the text of the tools, in words; empty if nothing. */
function mistakeIn(text) {
  if (!text.trim()) return "";
  let list;
  try {
    list = JSON.parse(text);
  } catch (error) {
    return `This is not JSON: ${error.message}`;
  }
  if (!Array.isArray(list)) return "This must be a list: [ … ].";
  const wrong = list.findIndex((tool) => tool?.type !== "function" || typeof tool.function?.name !== "string");
  if (wrong < 0) return "";
  return `Tool ${wrong + 1} must look like {"type": "function", "function": {"name": …}}.`;
}
