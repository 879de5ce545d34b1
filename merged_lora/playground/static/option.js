// One option of a strategy, as the table describes it.

import { make } from "./dom.js";
import { Field } from "./field.js";

/** @typedef {import("./server.js").Option} Option */

/** Positions of a slider. */
const STEPS = 100;

/** One value for all sources or, if the option takes that, one for each. */
export class OptionField extends EventTarget {
  #whole;
  /** @type {Map<string, Field>} */
  #each;
  #split = make("input", { type: "checkbox" });
  #usual;

  /**
   * @param {Option} option
   * @param {string[]} sources
   * @param {string} [text] such as `0.5` or `[0.5, 0.2]`
   */
  constructor(option, sources, text = "") {
    super();
    const taken = option.per_source && sources.length > 1 ? sources : [];
    const look = (/** @type {string} */ name) => ({
      ...lookOf(option, `${option.name} of ${name}`),
      help: "",
    });
    this.#whole = new Field(lookOf(option, option.name));
    this.#each = new Map(taken.map((name) => [name, new Field(look(name))]));
    this.#usual = option.default === null ? "" : String(option.default);
    const fields = [this.#whole, ...this.#each.values()];
    this.element = make("div", {}, ...fields.map((field) => field.element));
    if (taken.length) {
      this.element.append(
        make("label", { className: "tick" }, this.#split, ` one ${option.name} for each source`),
      );
    }
    this.text = text;
    for (const field of fields) field.addEventListener("change", () => this.#changed());
    this.#split.addEventListener("change", () => {
      if (this.#split.checked) for (const field of this.#each.values()) field.text = this.#whole.text;
      this.#show();
      this.#changed();
    });
  }

  get text() {
    return this.#split.checked ? this.#list([...this.#each.keys()]) : this.#whole.text;
  }

  set text(text) {
    const inner = /^\s*\[(.*)\]\s*$/.exec(text)?.[1];
    const list = inner?.split(",").map((part) => part.trim()) ?? [];
    this.#split.checked = list.length > 0 && list.length === this.#each.size;
    if (!this.#split.checked) this.#whole.text = text;
    else for (const [i, field] of [...this.#each.values()].entries()) field.text = list[i] ?? "";
    this.#show();
  }

  /** Its text for other sources: those that stay keep their values. @param {string[]} sources */
  textFor(sources) {
    return this.#split.checked ? this.#list(sources) : this.#whole.text;
  }

  clearError() {
    for (const field of [this.#whole, ...this.#each.values()]) field.error = null;
  }

  /** @param {string} message @param {number} source whose value is wrong, if each has one */
  showError(message, source) {
    const each = [...this.#each.values()];
    const field = this.#split.checked ? (each[source] ?? each[0]) : this.#whole;
    if (field) field.error = message;
  }

  /** @param {string[]} sources */
  #list(sources) {
    const texts = sources.map((name) => this.#each.get(name)?.text.trim() || this.#usual);
    return texts.length > 1 ? `[${texts.join(", ")}]` : (texts[0] ?? "");
  }

  #show() {
    const split = this.#split.checked;
    this.#whole.element.hidden = split;
    for (const field of this.#each.values()) field.element.hidden = !split;
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

/** @param {Option} option @param {string} label @returns {import("./field.js").Look} */
function lookOf(option, label) {
  const placeholder = option.default === null ? "" : String(option.default);
  const look = { label, help: option.help, placeholder };
  const { type, enum: words } = option.schema;
  const values = type === "boolean" ? ["false", "true"] : words;
  if (values) return { ...look, choices: values };
  const range = rangeOf(option);
  return range ? { ...look, range } : look;
}

/**
 * How far the slider of an option goes; undefined for one that is better typed.
 *
 * @param {Option} option
 * @returns {import("./field.js").Range | undefined}
 */
export function rangeOf({ schema, default: usual }) {
  if (schema.type !== "number") return undefined;
  const min = schema.minimum ?? schema.exclusiveMinimum ?? 0;
  const max = schema.maximum ?? 2 * (Number(usual) || 1);
  const step = (max - min) / STEPS;
  return { min: schema.exclusiveMinimum === undefined ? min : min + step, max, step };
}
