// How the page makes elements. Children are nodes or texts, and a text becomes a text node.

export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Enter submits a text area's form; with Shift it is a new line, and in an input method it picks a word. */
export function submitOnEnter(textarea) {
  textarea.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    textarea.form.requestSubmit();
  });
}
