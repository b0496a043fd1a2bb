// Questions to begin with: such as the built-in model was trained on, and others for models that know more.

const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the weather of a city",
    parameters: {
      type: "object",
      properties: { city: { type: "string", description: "Name of the city" } },
      required: ["city"],
    },
  },
};
const TOOL_CALL = { text: "What is the weather in Oslo?", tools: [WEATHER], note: "with a tool" };

export function aboutModel(model) {
  if (model.root !== "builtin") return "";
  return "This is the small model that ships with qjax. It knows little beyond questions like these.";
}

export function examplesFor(model) {
  if (model.root === "builtin") {
    return [{ text: "What is 1234 + 5678?" }, { text: "What is the capital of Norway?" }, TOOL_CALL];
  }
  return [
    { text: "Why is the sky blue? Answer in three sentences." },
    { text: "Write a Python function that tells whether a text is a palindrome." },
    TOOL_CALL,
  ];
}
