// Merges that are kept, in this browser, and two of them compared on several prompts.

import { Comparison, save } from "./comparing.js";
import { byId, isAbort, make } from "./dom.js";
import { Field } from "./field.js";
import { ServerError } from "./server.js";

/**
 * @typedef {import("./server.js").Server} Server
 * @typedef {import("./server.js").Question} Question
 */

const STORE = "merged-lora kept";
const MOST = 50;

/**
 * Events: `chosen`, with a kept spec as detail that is to be shown again, `comparing` before two are compared
 * and `compared` after that.
 */
export class Kept extends EventTarget {
  #list = byId("kept-list", HTMLUListElement);
  #specs = stored();
  /** @type {string[]} */
  #models = [];
  #sides = /** @type {const} */ (["A", "B"]).map((label) => new Field({ label, choices: [] }));
  #prompts = new Field({
    label: "Prompts, one a line, or JSON lines as merged-lora calibrate takes them",
    lines: 4,
    id: "prompts-text",
  });
  #compare = byId("compare", HTMLButtonElement);
  #stop = byId("compare-stop", HTMLButtonElement);
  #saves = [byId("save-json", HTMLButtonElement), byId("save-markdown", HTMLButtonElement)];
  #said = byId("compared", HTMLParagraphElement);
  #place = byId("comparison", HTMLElement);
  #spec;
  #asked;
  #server;
  /** @type {AbortController | null} */
  #run = null;
  /** @type {Comparison | null} */
  #comparison = null;

  /**
   * @param {Server} server
   * @param {() => Promise<string | null>} spec that of the controls, null if they make none
   * @param {() => Question | null} asked how prompts are asked; null if that cannot be
   */
  constructor(server, spec, asked) {
    super();
    this.#server = server;
    this.#spec = spec;
    this.#asked = asked;
    byId("pair", HTMLDivElement).append(...this.#sides.map((field) => field.element));
    byId("prompts", HTMLDivElement).append(this.#prompts.element);
    byId("keep", HTMLButtonElement).addEventListener("click", async () => this.#keep(await this.#spec()));
    byId("prompts-file", HTMLInputElement).addEventListener("change", (event) => this.#read(event));
    this.#compare.addEventListener("click", () => this.#start());
    this.#stop.addEventListener("click", () => this.stop());
    const [json, markdown] = this.#saves;
    json?.addEventListener("click", () => {
      if (this.#comparison) save("comparison.json", "application/json", this.#comparison.json());
    });
    markdown?.addEventListener("click", () => {
      if (this.#comparison) save("comparison.md", "text/markdown", this.#comparison.markdown());
    });
    addEventListener("storage", ({ key }) => {
      if (key !== STORE && key !== null) return;
      this.#specs = stored(); // another page of this server has changed them
      this.#show();
    });
    this.#show();
  }

  /** @param {string[]} names the models that the server has by name */
  set models(names) {
    this.#models = names;
    this.#show();
  }

  /** Whether two are being compared. */
  get isComparing() {
    return this.#run !== null;
  }

  stop() {
    this.#run?.abort();
  }

  /** @param {string | null} spec */
  #keep(spec) {
    if (!spec) return;
    this.#specs = [spec, ...this.#specs.filter((each) => each !== spec)].slice(0, MOST);
    this.#store();
    const [one, other] = this.#sides;
    if (one && other && this.#specs.length > 1) [one.text, other.text] = [this.#specs[1] ?? "", spec];
  }

  /** Keeps the specs in this browser, unless its settings forbid that. */
  #store() {
    this.#show();
    try {
      localStorage.setItem(STORE, JSON.stringify(this.#specs));
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      byId("kept-said", HTMLParagraphElement).textContent = "this browser forgets them with the page";
    }
  }

  #show() {
    this.#list.replaceChildren(...this.#specs.map((spec) => this.#item(spec)));
    for (const field of this.#sides) field.choices = [...this.#specs, ...this.#models];
  }

  /** @param {string} spec */
  #item(spec) {
    const back = make("button", { type: "button", className: "spec" }, spec);
    back.addEventListener("click", () => this.dispatchEvent(new CustomEvent("chosen", { detail: spec })));
    const away = make("button", { type: "button", className: "away", "aria-label": `Forget ${spec}` }, "×");
    away.addEventListener("click", () => {
      this.#specs = this.#specs.filter((each) => each !== spec);
      this.#store();
      byId("keep", HTMLButtonElement).focus();
    });
    return make("li", { className: "row" }, back, away);
  }

  /** @param {Event} event */
  async #read(event) {
    const file = /** @type {HTMLInputElement} */ (event.target).files?.[0];
    if (!file) return;
    this.#say("");
    this.#prompts.error = null;
    try {
      this.#prompts.text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      this.#prompts.error = `${file.name} is not a text in UTF-8`;
    }
  }

  async #start() {
    const asked = this.#asked();
    if (!asked) return this.#say("the question has a mistake");
    const run = new AbortController();
    this.#run = run;
    this.#comparison = null;
    this.dispatchEvent(new Event("comparing"));
    this.#busy(true);
    this.#prompts.error = null;
    try {
      const prompts = await this.#server.prompts(this.#prompts.text, run.signal).catch((error) => {
        if (error instanceof ServerError && error.status === 400) this.#prompts.error = error.message;
        throw error;
      });
      const [one, other] = this.#sides.map((field) => field.text);
      const comparison = new Comparison([one ?? "", other ?? ""], asked, this.#server.at);
      this.#comparison = comparison;
      await comparison.run(this.#server, prompts, run.signal, (said) => this.#say(said));
      this.#say(comparison.summary);
    } catch (error) {
      if (isAbort(error)) this.#say(`given up; ${this.#comparison?.summary ?? "nothing was asked"}`);
      else if (error instanceof ServerError) this.#say(error.message);
      else throw error;
    } finally {
      this.#run = null;
      this.#busy(false);
      this.#showComparison();
      this.dispatchEvent(new Event("compared"));
    }
  }

  #showComparison() {
    const found = this.#comparison?.rows.length ? this.#comparison : null;
    this.#place.hidden = !found;
    this.#place.replaceChildren(...(found ? [found.table()] : []));
    for (const button of this.#saves) button.disabled = !found;
  }

  /** @param {boolean} busy */
  #busy(busy) {
    const [on, off] = busy ? [this.#stop, this.#compare] : [this.#compare, this.#stop];
    on.disabled = false;
    if (document.activeElement === off) on.focus(); // a button that is disabled loses the focus
    off.disabled = true;
  }

  /** @param {string} said */
  #say(said) {
    this.#said.textContent = said;
  }
}

/** The specs that this browser keeps; none if what it keeps is not ours. @returns {string[]} */
function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    return Array.isArray(found) ? found.filter((each) => typeof each === "string").slice(0, MOST) : [];
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof DOMException) return [];
    throw error;
  }
}
