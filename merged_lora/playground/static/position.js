// The merge as controls: strategy, sources with their weights, options. The table of strategies says
// which options there are, what they mean and how far they go.

import { make } from "./dom.js";
import { Field } from "./field.js";
import { OptionField, rangeOf } from "./option.js";

/**
 * @typedef {import("./server.js").Form} Form
 * @typedef {import("./server.js").Strategy} Strategy
 * @typedef {import("./server.js").Adapter} Adapter
 */

/** How far the slider of a weight goes; its text goes further. */
const WEIGHTS = { min: -1, max: 2, step: 0.05 };

/** The controls of a merge. An event `change` says that somebody moved one. */
export class Position extends EventTarget {
  /** @type {Map<string, Field>} */
  #weights = new Map();
  /** @type {Map<string, OptionField>} */
  #options = new Map();
  /** @type {Adapter[]} */
  #adapters = [];
  #strategies;
  #strategy;
  #adding;
  #summary = make("p", { className: "hint" });
  #add = make("button", { type: "button" }, "Add");
  #places;

  /**
   * @param {Strategy[]} strategies
   * @param {Record<"strategy" | "sources" | "adding" | "options" | "more", HTMLElement>} places
   */
  constructor(strategies, places) {
    super();
    this.#strategies = new Map(strategies.map((each) => [each.name, each]));
    this.#places = places;
    this.#strategy = new Field({ label: "Strategy", choices: [...this.#strategies.keys()] });
    this.#adding = new Field({ label: "Add a source", choices: [] });
    places.strategy.append(this.#strategy.element, this.#summary);
    places.adding.append(make("div", { className: "row" }, this.#adding.element, this.#add));
    this.#showOptions({});
    this.#strategy.addEventListener("change", () => {
      this.#showOptions(this.form.options);
      this.#changed();
    });
    this.#add.addEventListener("click", () => {
      const name = this.#adding.text;
      if (!name) return this.#adding.focus();
      this.#reload([...this.form.sources, { name, weight: "1" }]);
      this.#weights.get(name)?.focus();
    });
  }

  /** @param {Adapter[]} adapters those that can be added */
  set adapters(adapters) {
    this.#adapters = adapters;
    this.#offer();
  }

  /** @returns {Form} */
  get form() {
    const sources = [...this.#weights].map(([name, field]) => ({ name, weight: field.text.trim() || "1" }));
    const options = [...this.#options].map(([name, field]) => [name, field.text]);
    return { strategy: this.#strategy.text, sources, options: Object.fromEntries(options) };
  }

  /** @param {Form} form */
  load(form) {
    const names = form.sources.map(({ name }) => name);
    const isSame =
      form.strategy === this.#strategy.text &&
      JSON.stringify(names) === JSON.stringify([...this.#weights.keys()]);
    if (isSame) return this.#set(form); // so that a control that somebody holds stays
    this.#strategy.text = form.strategy;
    this.#weights = new Map(form.sources.map(({ name, weight }) => [name, this.#weight(name, weight)]));
    this.#places.sources.replaceChildren(
      ...[...this.#weights].map(([name, field]) => this.#row(name, field)),
    );
    this.#showOptions(form.options);
    this.#offer();
  }

  /** Other values for the controls that are there. @param {Form} form */
  #set({ sources, options }) {
    for (const { name, weight } of sources) {
      const field = this.#weights.get(name);
      if (field && field.text !== weight) field.text = weight;
    }
    for (const [name, field] of this.#options) {
      const text = options[name] ?? "";
      if (field.text !== text) field.text = text;
    }
  }

  /** The names of the sources that count most. */
  get heaviest() {
    const sizes = this.form.sources.map(({ weight }) => Math.abs(Number(weight)) || 0);
    return this.form.sources.flatMap(({ name }, i) => (sizes[i] === Math.max(...sizes) ? [name] : []));
  }

  /** Other sources; options that have a value for each keep those of the sources that stay. */
  #reload(/** @type {import("./server.js").Source[]} */ sources) {
    const names = sources.map(({ name }) => name);
    const options = [...this.#options].map(([name, field]) => [name, field.textFor(names)]);
    this.load({ strategy: this.#strategy.text, sources, options: Object.fromEntries(options) });
    this.#changed();
  }

  clearErrors() {
    for (const field of [this.#strategy, this.#adding, ...this.#weights.values()]) field.error = null;
    for (const field of this.#options.values()) field.clearError();
  }

  /**
   * Shows an error at the control that caused it, if there is one.
   *
   * @param {string} message
   * @param {string | null} param the name of a field of the form
   * @returns {boolean} whether there is one
   */
  showError(message, param) {
    const found = this.#named(param ?? "") ?? this.#spoken(message);
    if (!found) return false;
    if (found instanceof OptionField) found.showError(message, Number(param?.split(".")[2] ?? 0));
    else found.error = message;
    const folded = found.element.closest("details");
    if (folded) folded.open = true;
    return true;
  }

  /** The field of a name such as `options.density`. @param {string} param */
  #named(param) {
    const [part, key = ""] = param.split(".");
    if (part === "strategy") return this.#strategy;
    if (part === "options") return this.#options.get(key);
    if (part !== "sources") return undefined;
    return key === "" ? this.#adding : [...this.#weights.values()][Number(key)];
  }

  /** The field of a source or an option that a sentence of the server names. @param {string} message */
  #spoken(message) {
    const quoted = (/** @type {string} */ name) =>
      message.includes(`'${name}'`) || message.includes(`"${name}"`);
    const source = [...this.#weights].find(([name]) => quoted(name));
    const option = [...this.#options].find(([name]) =>
      new RegExp(`(?<![\\w'])${name}(=| must)`).test(message),
    );
    return (source ?? option)?.[1];
  }

  /** @param {string} name @param {string} weight */
  #weight(name, weight) {
    const isListed = this.#adapters.some((each) => each.name === name) || !this.#adapters.length;
    const help = isListed ? "" : "not among the adapters that the server lists";
    const field = new Field({ label: name, value: weight, placeholder: "1", range: WEIGHTS, help });
    field.addEventListener("change", () => this.#changed());
    return field;
  }

  /** @param {string} name @param {Field} field */
  #row(name, field) {
    const away = make("button", { type: "button", className: "away", "aria-label": `Remove ${name}` }, "×");
    away.addEventListener("click", () => {
      this.#reload(this.form.sources.filter((each) => each.name !== name));
      (this.#adding.disabled ? this.#strategy : this.#adding).focus();
    });
    return make("div", { className: "row" }, field.element, away);
  }

  /** @param {Record<string, string>} texts by option; those that the strategy does not take are dropped */
  #showOptions(texts) {
    const strategy = this.#strategies.get(this.#strategy.text);
    this.#summary.textContent = strategy?.summary ?? "";
    const names = [...this.#weights.keys()];
    const taken = strategy?.options ?? [];
    this.#options = new Map(taken.map((each) => [each.name, new OptionField(each, names, texts[each.name])]));
    for (const field of this.#options.values()) field.addEventListener("change", () => this.#changed());
    const shown = (/** @type {boolean} */ slid) =>
      taken
        .filter((each) => Boolean(rangeOf(each)) === slid)
        .flatMap((each) => this.#options.get(each.name)?.element ?? []);
    this.#places.options.replaceChildren(...shown(true));
    this.#places.more.replaceChildren(...shown(false));
  }

  #offer() {
    const free = this.#adapters.filter((each) => !this.#weights.has(each.name));
    /** @type {[string, string][]} */
    const choices = free.map(({ name, refusal }) => [name, refusal ? `${name} (${refusal})` : name]);
    const none = this.#adapters.length ? "all are in" : "the server has no adapters";
    this.#adding.choices = choices.length ? choices : [["", none]];
    for (const each of [this.#adding, this.#add]) each.disabled = free.length === 0;
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
