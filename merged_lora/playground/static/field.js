// One setting: its label, its control, and the error that it caused.

import { make, newId } from "./dom.js";

/**
 * @typedef {{min: number, max: number, step: number}} Range
 * @typedef {object} Look
 * @property {string} label
 * @property {string} [help]
 * @property {string} [value]
 * @property {string} [placeholder] what a blank field means; of a list, the choice that blank text selects
 * @property {Range} [range] with it, a slider stands beside the text
 * @property {(string | [string, string])[]} [choices] with them, a list: each a text, or a text and what is shown
 * @property {number} [lines] of a text that is longer than one
 * @property {string} [id]
 */

export class Field extends EventTarget {
  #control;
  #slider;
  #error;
  #placeholder;

  /** @param {Look} look */
  constructor(look) {
    super();
    const id = look.id ?? newId("field");
    this.#placeholder = look.placeholder ?? "";
    this.#control = control(look, id);
    this.#error = make("p", { id: `${id}-error`, className: "error", "aria-live": "polite", hidden: true });
    const help = make("p", { id: `${id}-help`, className: "hint" }, look.help ?? "");
    const label = make("label", { htmlFor: id }, look.label);
    this.#slider = look.range ? slider(look.range, look.label) : null;
    for (const each of this.#controls()) {
      each.setAttribute("aria-describedby", look.help ? `${help.id} ${this.#error.id}` : this.#error.id);
    }
    this.element = make(
      "div",
      { className: this.#slider ? "field slid" : "field" },
      label,
      ...(this.#slider ? [this.#slider] : []),
      this.#control,
      ...(look.help ? [help] : []),
      this.#error,
    );
    if (look.value !== undefined || !look.choices) this.text = look.value ?? "";
    this.#control.addEventListener("input", () => this.#moved(this.#control.value));
    this.#slider?.addEventListener("input", () => this.#moved(this.#slider?.value ?? ""));
  }

  /** What a blank field means. */
  get usual() {
    return this.#placeholder;
  }

  get text() {
    return this.#control.value;
  }

  set text(text) {
    const isBlankList = this.#control instanceof HTMLSelectElement && text === "";
    this.#control.value = isBlankList ? this.#placeholder : text;
    if (!this.#slider) return;
    const shown = text.trim() === "" ? this.#placeholder : text;
    if (Number.isFinite(Number(shown)) && shown !== "") this.#slider.value = shown;
    this.#slider.setAttribute("aria-valuetext", shown);
  }

  /** @param {string | null} message */
  set error(message) {
    this.#error.textContent = message ?? "";
    this.#error.hidden = message === null;
    for (const each of this.#controls()) {
      if (message === null) each.removeAttribute("aria-invalid");
      else each.setAttribute("aria-invalid", "true");
    }
  }

  /** Whether what the text will be is still being found out. @param {boolean} busy */
  set busy(busy) {
    this.#control.setAttribute("aria-busy", String(busy));
  }

  get disabled() {
    return this.#control.disabled;
  }

  set disabled(/** @type {boolean} */ disabled) {
    for (const each of this.#controls()) each.disabled = disabled;
  }

  /**
   * What a list offers.
   *
   * @param {(string | [string, string])[]} choices
   */
  set choices(choices) {
    const before = this.text;
    this.#control.replaceChildren(...choices.map(choice));
    this.#control.value = before;
    if (this.#control instanceof HTMLSelectElement && this.#control.selectedIndex < 0) {
      this.#control.selectedIndex = 0;
    }
  }

  #controls() {
    return this.#slider ? [this.#slider, this.#control] : [this.#control];
  }

  focus() {
    this.#control.focus();
  }

  /** @param {string} text */
  #moved(text) {
    this.text = text;
    this.error = null;
    this.dispatchEvent(new Event("change"));
  }
}

/**
 * @param {Look} look
 * @param {string} id
 * @returns {HTMLInputElement | HTMLSelectElement | HTMLTextAreaElement}
 */
function control(look, id) {
  if (look.choices) return make("select", { id }, ...look.choices.map(choice));
  const shared = { id, placeholder: look.placeholder ?? "", spellcheck: false, autocomplete: "off" };
  if (look.lines) return make("textarea", { ...shared, rows: look.lines });
  return make("input", { ...shared, type: "text", inputMode: look.range ? "decimal" : "text" });
}

/** @param {string | [string, string]} given */
function choice(given) {
  const [value, shown] = typeof given === "string" ? [given, given] : given;
  return make("option", { value }, shown);
}

/** @param {Range} range @param {string} label */
function slider({ min, max, step }, label) {
  const element = make("input", { type: "range", "aria-label": `${label}, slider` });
  Object.assign(element, { min: String(min), max: String(max), step: String(step) });
  return element;
}
