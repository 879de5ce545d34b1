// Answers as words: how they differ, and how sure the model was of them.

import { make } from "./dom.js";
import { diffArrays } from "./jsdiff/array.js";

/** @typedef {import("./server.js").Piece} Piece */

/** The words of a text, and the white space between them. @param {string} text */
const split = (text) => text.match(/\s+|\S+/g) ?? [];
/** @param {string} part */
const isWord = (part) => part.trim() !== "";

/** Below these probabilities, a word is marked as unsure, as more and as most unsure. */
const UNSURE = [0.9, 0.6, 0.3];

/**
 * Which words of a text are not in another, in order.
 *
 * @param {string} text
 * @param {string} other
 * @returns {boolean[]} for each word of the text
 */
export function differing(text, other) {
  const changes = diffArrays(split(other).filter(isWord), split(text).filter(isWord));
  return changes.filter((change) => !change.removed).flatMap(({ value, added }) => value.map(() => added));
}

/**
 * An answer as elements.
 *
 * @param {Piece[]} pieces
 * @param {{differs?: boolean[] | null, sure?: boolean}} [looks] which words to mark, and whether to show how sure
 * @returns {(Node | string)[]}
 */
export function rendered(pieces, { differs = null, sure = false } = {}) {
  const lowest = sure ? lowestIn(pieces) : () => null;
  let word = -1;
  let at = 0;
  return split(textOf(pieces)).map((part) => {
    at += part.length;
    const probability = lowest(at);
    if (!isWord(part)) return part;
    word += 1;
    const differ = differs?.[word] ?? false;
    if (!differ && probability === null) return part;
    const element = make(differ ? "mark" : "span", {}, part);
    if (probability !== null) {
      element.title = `${(100 * probability).toFixed(0)} % sure`;
      element.dataset.unsure = String(UNSURE.filter((bound) => probability < bound).length);
    }
    return element;
  });
}

/** Whether the limit of tokens cut an answer. @param {Piece[]} pieces */
export function isCut(pieces) {
  return pieces.some((piece) => piece.isCut);
}

/** @param {Piece[]} pieces */
export function textOf(pieces) {
  return pieces.map((piece) => piece.text).join("");
}

/**
 * A function of a part of the text: the lowest probability of its pieces, null if there is none.  It is
 * called for one part after the other.
 *
 * @param {Piece[]} pieces
 * @returns {(end: number) => number | null} of the part that ends there
 */
function lowestIn(pieces) {
  let i = 0;
  let start = 0; // of piece i
  return (end) => {
    /** @type {number | null} */
    let found = null;
    for (let piece = pieces[i]; piece && start < end; piece = pieces[i]) {
      if (piece.logprob !== null) found = Math.min(found ?? 1, Math.exp(piece.logprob));
      if (start + piece.text.length > end) break; // it is in the next part too
      start += piece.text.length;
      i += 1;
    }
    return found;
  };
}

/**
 * The geometric mean of the tokens' probabilities; null if they have none.
 *
 * @param {Piece[]} pieces
 */
export function sureness(pieces) {
  const tokens = pieces.reduce((count, piece) => count + piece.tokens, 0);
  const sum = pieces.reduce((total, piece) => total + (piece.logprob ?? 0), 0);
  return tokens ? Math.exp(sum / tokens) : null;
}
