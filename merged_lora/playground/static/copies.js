// The lines that people take to their own clients, and the alias that they define on the server.

import { make } from "./dom.js";
import { Field } from "./field.js";
import { ServerError } from "./server.js";

const KINDS = /** @type {const} */ ([
  ["spec", "Copy spec"],
  ["curl", "Copy curl"],
  ["python", "Copy Python"],
  ["flag", "Copy flag"],
]);

/** @typedef {import("./server.js").Server} Server */

/** An event `refused` has as detail the error of a request that was not about the alias. */
export class Copies extends EventTarget {
  #alias = new Field({ label: "Alias", placeholder: "mix" });
  #define = make("button", { type: "button" }, "Define on the server");
  #fixed = make("p", { className: "hint" }, "--merged-lora-runtime-aliases lets the server take aliases");
  #said = make("p", { role: "status", className: "status" });
  #shown = make("pre", { hidden: true, tabIndex: 0, "aria-label": "Copied text" });
  #texts;
  #server;
  #spec;

  /**
   * @param {HTMLElement} place
   * @param {Server} server
   * @param {() => Promise<string | null>} spec that of the controls, null if they make none
   * @param {(spec: string, alias: string) => ReturnType<Server["copies"]>} texts
   */
  constructor(place, server, spec, texts) {
    super();
    this.#server = server;
    this.#spec = spec;
    this.#texts = texts;
    const buttons = KINDS.map(([kind, label]) => {
      const button = make("button", { type: "button" }, label);
      button.addEventListener("click", () => this.#run((spec) => this.#copy(kind, spec)));
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

  /** @param {(spec: string) => Promise<string>} work returns what is said of its success */
  async #run(work) {
    this.#alias.error = null;
    this.#said.textContent = "";
    const spec = await this.#spec();
    if (spec === null) return;
    try {
      this.#said.textContent = await work(spec);
    } catch (error) {
      this.#said.textContent = "";
      if (!(error instanceof ServerError)) throw error;
      if (error.param === "alias") this.#alias.error = error.message;
      else this.dispatchEvent(new CustomEvent("refused", { detail: error }));
    }
  }

  /** @param {"spec" | "curl" | "python" | "flag"} kind @param {string} spec */
  async #copy(kind, spec) {
    const text = (await this.#texts(spec, this.#alias.text))[kind];
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
    this.#said.textContent = `making ${spec}`;
    const busy = (/** @type {number} */ s) => {
      this.#said.textContent = `the server is busy; asking again in ${s} s`;
    };
    try {
      await this.#server.define(name, spec, AbortSignal.timeout(600_000), busy);
    } catch (error) {
      // What the server says against a definition is about its name as often as not, and shown there.
      throw error instanceof ServerError ? new ServerError(error.message, error.status, "alias") : error;
    }
    return `${name} is now ${spec}`;
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
