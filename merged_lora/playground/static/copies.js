// The lines that people take to their own clients, and the alias that they define on the server.

import { make } from "./dom.js";
import { Field } from "./field.js";
import { ServerError } from "./server.js";

/**
 * @typedef {import("./server.js").Server} Server
 * @typedef {import("./server.js").Question} Question
 */

/**
 * Events: `refused`, whose detail is a spec and the error of a request that was not about the alias, and
 * `defined` after an alias was.
 */
export class Copies extends EventTarget {
  #alias = new Field({ label: "Alias", placeholder: "mix" });
  #define = make("button", { type: "button" }, "Define on the server");
  #fixed = make("p", { className: "hint" }, "--merged-lora-runtime-aliases lets the server take aliases");
  #said = make("p", { role: "status", className: "status" });
  #shown = make("pre", { hidden: true, tabIndex: 0, role: "region", "aria-label": "Copied text" });
  #server;
  #spec;
  #question;
  /** @type {import("./server.js").Alias[]} */
  aliases = [];
  /** The redefinition that was warned of: the alias, what it is and what it would be. */
  #warned = "";

  /**
   * @param {HTMLElement} place
   * @param {Server} server
   * @param {() => Promise<string | null>} spec that of the controls, null if they make none
   * @param {() => Question | null} question that of the page, null if it cannot be asked
   */
  constructor(place, server, spec, question) {
    super();
    this.#server = server;
    this.#spec = spec;
    this.#question = question;
    /** @type {[string, (spec: string) => Promise<string | null>][]} */
    const kinds = [
      ["Copy spec", async (spec) => spec],
      ["Copy curl", (spec) => this.#request(spec, "curl")],
      ["Copy Python", (spec) => this.#request(spec, "python")],
      ["Copy flag", (spec) => server.flag(spec, this.#alias.text.trim(), AbortSignal.timeout(10_000))],
    ];
    const buttons = kinds.map(([label, textOf]) => {
      const button = make("button", { type: "button" }, label);
      button.addEventListener("click", () => this.#run(async (spec) => this.#copy(await textOf(spec))));
      return button;
    });
    this.#define.addEventListener("click", () => this.#run((spec) => this.#send(spec)));
    place.append(
      make("div", { className: "buttons" }, ...buttons),
      make("div", { className: "row" }, this.#alias.element, this.#define),
      this.#fixed,
      this.#said,
      this.#shown,
    );
  }

  /** Whether the server lets aliases change. @param {boolean} may */
  set mayDefine(may) {
    this.#define.disabled = !may;
    this.#fixed.hidden = may;
  }

  /** Forgets what was said of another merge. */
  clear() {
    this.#alias.error = null;
    this.#say("");
  }

  /** @param {(spec: string) => Promise<string>} work returns what is said of its success */
  async #run(work) {
    this.clear();
    this.#shown.hidden = true;
    const spec = await this.#spec();
    if (spec === null) return this.#say("the merge has a mistake");
    try {
      this.#say(await work(spec));
    } catch (error) {
      this.#say("");
      if (!(error instanceof ServerError)) throw error;
      if (error.param === "alias") this.#alias.error = error.message;
      else this.dispatchEvent(new CustomEvent("refused", { detail: { spec, error } }));
    }
  }

  /** @param {string} spec @param {"curl" | "python"} kind */
  async #request(spec, kind) {
    const question = this.#question();
    if (!question) return null;
    return (await this.#server.copies(spec, question, AbortSignal.timeout(10_000)))[kind];
  }

  /** @param {string | null} text null if there is none */
  async #copy(text) {
    if (text === null) return "the question has a mistake";
    this.#shown.textContent = text;
    this.#shown.hidden = false;
    return (await toClipboard(text, this.#shown)) ? "copied" : "press Ctrl+C to copy";
  }

  /** @param {string} spec */
  async #send(spec) {
    const name = this.#alias.text.trim();
    if (!name) {
      this.#alias.focus();
      throw new ServerError("type the name of the alias", 0, "alias");
    }
    await this.#server.flag(spec, name, AbortSignal.timeout(10_000)); // refuses a name that no alias can have
    const before = this.aliases.find((alias) => alias.name === name);
    const redefinition = JSON.stringify([name, before?.spec, spec]);
    if (before && before.spec !== spec && this.#warned !== redefinition) {
      this.#warned = redefinition;
      return `${name} is ${before.spec} now; press again to redefine it`;
    }
    this.#warned = "";
    this.#say(`making ${spec}`);
    try {
      await this.#server.define(name, spec, AbortSignal.timeout(600_000), (said) => this.#say(said));
    } catch (error) {
      // Nothing says whether a refusal is of the name or of the merge, which has been asked before as a rule.
      if (!(error instanceof ServerError) || !error.isOfRequest) throw error;
      throw new ServerError(error.message, error.status, "alias");
    }
    this.dispatchEvent(new Event("defined"));
    return `${name} is now ${spec}`;
  }

  /** @param {string} said */
  #say(said) {
    this.#said.textContent = said;
  }
}

/**
 * Copies a text.  A page that is neither from this machine nor over TLS has no clipboard: there, the text is
 * selected for the user to copy.
 *
 * @param {string} text
 * @param {HTMLElement} shown
 */
async function toClipboard(text, shown) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch (error) {
      if (!(error instanceof DOMException)) throw error; // not allowed: selected below
    }
  }
  getSelection()?.selectAllChildren(shown);
  return false;
}
