// Two models on several prompts: their answers beside each other, as a table, JSON or Markdown.

import { make } from "./dom.js";
import { isChat } from "./server.js";
import { differing, isCut, rendered, textOf } from "./words.js";

/**
 * @typedef {import("./server.js").Server} Server
 * @typedef {import("./server.js").Question} Question
 * @typedef {import("./server.js").Piece} Piece
 * @typedef {{prompt: Question["prompt"], answers: [Piece[], Piece[]]}} Row
 */

/** The answers of two models, named by spec, to the same prompts. */
export class Comparison {
  /** @type {Row[]} */
  rows = [];

  /**
   * @param {[string, string]} models
   * @param {Question} question how the prompts are asked; its own prompt is not
   * @param {string} server its address, for the record
   */
  constructor(models, { prompt: _, ...asked }, server) {
    this.models = models;
    this.asked = asked;
    this.server = server;
    this.date = new Date().toISOString();
  }

  /**
   * Asks both for their answers, one after the other.
   *
   * @param {Server} server
   * @param {Question["prompt"][]} prompts
   * @param {AbortSignal} signal
   * @param {(said: string) => void} say called with how far it is
   */
  async run(server, prompts, signal, say) {
    for (const [i, prompt] of prompts.entries()) {
      /** @type {[Piece[], Piece[]]} */
      const answers = [[], []];
      for (const [side, model] of this.models.entries()) {
        say(`prompt ${i + 1} of ${prompts.length}: ${model}`);
        const { pieces } = await server.answer(model, { ...this.asked, prompt }, signal, say);
        for await (const piece of pieces) answers[side]?.push(piece);
      }
      this.rows.push({ prompt, answers });
    }
  }

  /** How many answers are the same. */
  get same() {
    return this.rows.filter(({ answers: [one, other] }) => textOf(one) === textOf(other)).length;
  }

  get summary() {
    return `${this.same} of ${this.rows.length} answers are the same`;
  }

  /** @returns {HTMLElement} */
  table() {
    const heads = ["prompt", ...this.models].map((name) => make("th", { scope: "col" }, name));
    const rows = this.rows.map(({ prompt, answers: [one, other] }) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, shown(prompt)),
        make("td", {}, ...rendered(one), ...cut(one)),
        make("td", {}, ...rendered(other, { differs: differing(textOf(other), textOf(one)) }), ...cut(other)),
      ),
    );
    return make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows));
  }

  /** @returns {string} */
  json() {
    const rows = this.rows.map(({ prompt, answers }) => {
      const [one, other] = answers.map(textOf);
      return {
        prompt,
        chat: isChat({ ...this.asked, prompt }),
        answers: [one, other],
        cut: answers.map(isCut),
        differing: differing(other ?? "", one ?? "").filter(Boolean).length,
      };
    });
    const { models, asked, same, server, date } = this;
    return `${JSON.stringify({ server, date, models, asked, same, rows }, null, 2)}\n`;
  }

  /** @returns {string} */
  markdown() {
    const line = (/** @type {string[]} */ cells) => `| ${cells.map(cell).join(" | ")} |`;
    const ended = (/** @type {Piece[]} */ answer) => textOf(answer) + (isCut(answer) ? "\n(cut)" : "");
    const rows = this.rows.map(({ prompt, answers }) => line([shown(prompt), ...answers.map(ended)]));
    const { chat, temperature, max_tokens: most } = this.asked;
    const how = `As ${chat ? "a chat" : "a text"}, temperature ${temperature}, at most ${most} tokens`;
    const about = `${how}, ${this.server}, ${this.date}: ${this.summary}.`;
    return `${[about, "", line(["prompt", ...this.models]), "|---|---|---|", ...rows].join("\n")}\n`;
  }
}

/** What says that an answer was cut. @param {Piece[]} answer */
function cut(answer) {
  return isCut(answer) ? [make("p", { className: "hint" }, "cut at the limit of tokens")] : [];
}

/** @param {Question["prompt"]} prompt */
function shown(prompt) {
  return typeof prompt === "string"
    ? prompt
    : prompt.map(({ role, content }) => `${role}: ${content}`).join("\n");
}

/** A text as one cell of a Markdown table, in which it means nothing but itself. @param {string} text */
function cell(text) {
  const literal = text.replace(/[\\`*_{}[\]<>#|~&]/g, "\\$&");
  return literal.trim().replace(/\s*\n\s*/g, "<br>");
}

/**
 * Lets the user save a text as a file.
 *
 * @param {string} name
 * @param {string} type
 * @param {string} text
 */
export function save(name, type, text) {
  const href = URL.createObjectURL(new Blob([text], { type }));
  const link = make("a", { href, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}
