// The answers of the merge, of its sources and of the base model beside each other.

import { isAbort, make } from "./dom.js";
import { ServerError } from "./server.js";
import { differing, isCut, rendered, sureness, textOf } from "./words.js";

/**
 * @typedef {import("./server.js").Server} Server
 * @typedef {import("./server.js").Question} Question
 * @typedef {import("./server.js").Piece} Piece
 * @typedef {import("./server.js").Made} Made
 * @typedef {import("./server.js").Survival} Survival
 * @typedef {{spec: string, names: string[]}} Merge the canonical spec, and its sources
 */

/**
 * All answers.  Events: `asking` when the server is asked for answers, `checking` when it is asked what survives,
 * `settled` when nothing is under way, and `refused`, whose detail is the spec of a merge and its error.
 */
export class Answers extends EventTarget {
  /** @type {Map<string, Card>} */
  #cards = new Map();
  #place;
  #server;
  #merge;
  /** @type {AbortController | null} */
  #run = null;
  /** @type {Promise<void>} */
  #underWay = Promise.resolve();
  /** @type {string[]} */
  #candidates = [];
  #sure = false;
  /** @type {AbortController | null} */
  #check = null;

  /** @param {HTMLElement} place @param {Server} server */
  constructor(place, server) {
    super();
    this.#place = place;
    this.#server = server;
    this.#merge = new Card("the merge", "card merge");
    this.#merge.survive.addEventListener("click", () => this.#survive());
    this.#place.append(this.#merge.element);
  }

  /** The names of the models whose answers are there to be compared with. */
  get names() {
    return [...this.#cards.keys()];
  }

  /** Names of answers with the nearest of which the merge's is compared. @param {string[]} names */
  set candidates(names) {
    this.#candidates = names;
    this.#compare();
  }

  /** Name of the answer with which it is. */
  get against() {
    return this.#nearest()?.name ?? this.#candidates[0] ?? "";
  }

  /** Whether to show how sure each word was. @param {boolean} sure */
  set sure(sure) {
    this.#sure = sure;
    for (const card of this.#cards.values()) card.render({ sure });
    this.#compare();
  }

  /**
   * Asks the merge; and its sources and the base model, unless they have been asked the same.
   *
   * The sources follow when the merge begins to answer.  The base model comes last and by itself: vLLM's CPU
   * build spoils its answer beside those of adapters.
   *
   * @param {Merge} merge
   * @param {(name: string) => string} modelOf the model that answers as a source does
   * @param {string} base
   * @param {Question} question
   */
  ask(merge, modelOf, base, question) {
    this.stop();
    const run = new AbortController();
    this.#run = run;
    const kept = this.#cards;
    this.#cards = new Map(
      [...merge.names, base].map((name) => [name, kept.get(name) ?? new Card(name, "card")]),
    );
    const cards = [this.#merge, ...this.#cards.values()];
    this.#place.replaceChildren(...cards.map((card) => card.element));
    for (const card of cards) if (card === this.#merge || !card.answers(question)) card.wait();
    this.#merge.subject = merge.spec;
    this.dispatchEvent(new Event("asking"));
    this.#underWay = this.#all(merge, modelOf, base, question, run).finally(() => {
      if (this.#run !== run) return;
      this.#run = null;
      this.#settle();
    });
  }

  /** Gives up all that is under way. */
  stop() {
    if (!this.#run && !this.#check) return;
    this.#run?.abort();
    this.#check?.abort();
    this.#run = this.#check = null;
    for (const card of [this.#merge, ...this.#cards.values()]) card.giveUp();
    this.dispatchEvent(new Event("settled"));
  }

  /** Whether something else asks the server, so that nothing may be asked here. @param {boolean} held */
  set isHeld(held) {
    this.#merge.survive.disabled = held;
  }

  /**
   * @param {Merge} merge
   * @param {(name: string) => string} modelOf
   * @param {string} base
   * @param {Question} question
   * @param {AbortController} run
   */
  async #all(merge, modelOf, base, question, run) {
    const { promise: begun, resolve: begin } = Promise.withResolvers();
    const merged = this.#one(this.#merge, merge.spec, question, run.signal, begin);
    await Promise.race([begun, merged]); // the merge is what somebody waits for: no other request delays it
    const others = merge.names.map((name) => this.#again(name, modelOf(name), question, run.signal));
    const error = await merged;
    if (error && this.#run === run) {
      this.dispatchEvent(new CustomEvent("refused", { detail: { spec: merge.spec, error } }));
    }
    await Promise.all(others);
    await this.#again(base, base, question, run.signal);
  }

  /**
   * @param {string} name
   * @param {string} model
   * @param {Question} question
   * @param {AbortSignal} signal
   */
  async #again(name, model, question, signal) {
    const card = this.#cards.get(name);
    if (signal.aborted || !card || card.answers(question)) return;
    await this.#one(card, model, question, signal, () => {});
  }

  /**
   * Asks one model.
   *
   * @param {Card} card
   * @param {string} model
   * @param {Question} question
   * @param {AbortSignal} signal
   * @param {(value: null) => void} begun called when the server begins to reply
   * @returns {Promise<ServerError | null>} what the server says against it, null if nothing
   */
  async #one(card, model, question, signal, begun) {
    const answering = card.begin(question);
    try {
      const { made, pieces } = await this.#server.answer(model, question, signal, answering.busy);
      begun(null);
      for await (const piece of pieces) answering.add(piece, this.#sure);
      if (signal.aborted) return null;
      answering.complete();
      this.#compare();
      if (made) await this.#describe(card, made, signal);
    } catch (error) {
      if (signal.aborted && isAbort(error)) return null; // given up, which the card already shows
      if (!(error instanceof ServerError)) throw error;
      answering.fail(error);
      return error;
    }
    return null;
  }

  /** Says so if nothing is under way. */
  #settle() {
    if (!this.#run && !this.#check) this.dispatchEvent(new Event("settled"));
  }

  /** Marks the words of the merge's answer that differ from the one it is compared with. */
  #compare() {
    this.#merge.render({ sure: this.#sure, other: this.#nearest() });
  }

  /** The candidate that differs least from the merge; null if none is complete. */
  #nearest() {
    const complete = this.#candidates
      .flatMap((name) => this.#cards.get(name) ?? [])
      .filter((card) => card.isComplete);
    const counts = new Map(
      complete.map((card) => [card, this.#merge.differences(card).filter(Boolean).length]),
    );
    return complete.toSorted((one, other) => (counts.get(one) ?? 0) - (counts.get(other) ?? 0))[0] ?? null;
  }

  /**
   * Shows what the server says of the merge that answered.
   *
   * @param {Card} card
   * @param {Made} made
   * @param {AbortSignal} signal
   */
  async #describe(card, { digest, isNew, milliseconds }, signal) {
    card.fact("merge", isNew ? `new, made in ${milliseconds.toFixed(0)} ms` : "ready before");
    try {
      const merge = await this.#server.merge(digest, signal);
      card.fact("rank", String(merge.rank));
      const kept = merge.kept_energy;
      if (kept !== null) card.fact("kept energy at this rank", `${(100 * kept).toFixed(1)} %`);
      if (merge.replay) card.showSurvivals(merge.replay);
    } catch (error) {
      if (!(error instanceof ServerError) && !isAbort(error)) throw error; // the answer is complete without
    }
  }

  /** Asks which answers of its sources the merge still gives, once nothing else is under way. */
  async #survive() {
    const card = this.#merge;
    const check = new AbortController();
    this.#check = check;
    card.note("asking the merge for the sources' own answers");
    this.dispatchEvent(new Event("checking"));
    try {
      await this.#underWay;
      if (check.signal.aborted) return;
      card.showSurvivals(await this.#server.survivals(card.subject, check.signal, (said) => card.note(said)));
    } catch (error) {
      if (isAbort(error)) return;
      if (!(error instanceof ServerError)) throw error;
      card.note(error.message, true);
    } finally {
      if (this.#check === check) {
        this.#check = null;
        this.#settle();
      }
    }
  }
}

/** The answer of one model. */
class Card {
  /** @type {Piece[]} */
  #pieces = [];
  #question = "";
  /** @type {"" | "waiting" | "answering" | "complete" | "failed" | "given up"} */
  #state = "";
  /** Which answer is the current one; what comes for an earlier one is dropped. */
  #turn = 0;
  /** Whether it is shown what survives. */
  #isChecked = false;
  #status = make("p", { role: "status", className: "status" });
  #subject = make("p", { className: "subject", hidden: true });
  #text = make("div", { className: "text", tabIndex: 0, role: "region" });
  #facts = make("dl");
  #error = make("p", { className: "error", hidden: true });
  #survived = make("div", { className: "survived", tabIndex: -1, "aria-live": "polite" });
  /** The button that asks what survives. */
  survive = make("button", { type: "button", hidden: true }, "What survives of each source?");

  /** @param {string} name @param {string} looks */
  constructor(name, looks) {
    this.name = name;
    this.#text.setAttribute("aria-label", `Answer of ${name}`);
    this.element = make(
      "article",
      { className: looks },
      make("h3", {}, name),
      this.#subject,
      this.#text,
      this.#error,
      this.#status,
      this.#facts,
      this.survive,
      this.#survived,
    );
  }

  get isComplete() {
    return this.#state === "complete";
  }

  get subject() {
    return this.#subject.textContent ?? "";
  }

  /** The spec of the merge that answers here. @param {string} spec */
  set subject(spec) {
    this.#subject.textContent = spec;
    this.#subject.hidden = false;
  }

  /** Whether it is the answer to a question. @param {Question} question */
  answers(question) {
    return this.isComplete && this.#question === JSON.stringify(question);
  }

  wait() {
    this.#turn += 1;
    this.#pieces = [];
    this.#error.hidden = true;
    this.survive.hidden = true;
    this.#text.replaceChildren();
    this.#facts.replaceChildren();
    this.#survived.replaceChildren();
    this.#become("waiting");
  }

  giveUp() {
    if (this.isComplete && !this.#isChecked) this.note("", !this.#subject.hidden);
    if (this.#state !== "waiting" && this.#state !== "answering") return;
    this.#turn += 1;
    this.#become("given up");
  }

  /**
   * An answer to a question, which is shown as it comes.
   *
   * @param {Question} question
   */
  begin(question) {
    const begin = performance.now();
    const seconds = () => `${((performance.now() - begin) / 1000).toFixed(2)} s`;
    this.wait();
    const turn = this.#turn;
    const isCurrent = () => turn === this.#turn;
    this.#question = JSON.stringify(question);
    return {
      busy: (/** @type {string} */ said) => {
        if (isCurrent()) this.#say(said);
      },
      add: (/** @type {Piece} */ piece, /** @type {boolean} */ sure) => {
        if (!isCurrent()) return;
        if (!this.#pieces.length) {
          this.fact("first token", seconds());
          this.#become("answering");
        }
        this.#pieces.push(piece);
        this.render({ sure });
      },
      complete: () => {
        if (!isCurrent()) return;
        this.fact("whole answer", seconds());
        const sure = sureness(this.#pieces);
        if (sure !== null) this.fact("sure", `${(100 * sure).toFixed(0)} %`);
        this.#become("complete");
        this.survive.hidden = this.#subject.hidden;
      },
      fail: (/** @type {ServerError} */ error) => {
        if (!isCurrent()) return;
        this.#error.textContent = error.message;
        this.#error.hidden = false;
        this.#become("failed");
      },
    };
  }

  /** @param {{sure: boolean, other?: Card | null}} looks what it is compared with, and whether to show how sure */
  render({ sure, other = null }) {
    const differs = this.isComplete && other ? this.differences(other) : null;
    this.#text.replaceChildren(...rendered(this.#pieces, { differs, sure }));
    if (!this.isComplete) return;
    if (!other || !differs) return this.#say(this.#ended);
    const count = differs.filter(Boolean).length;
    this.#say(
      `${this.#ended}; ${count === 1 ? "1 word differs" : `${count || "no"} words differ`} from ${other.name}`,
    );
  }

  /** Which of its words another answer lacks. @param {Card} other */
  differences(other) {
    return differing(textOf(this.#pieces), textOf(other.#pieces));
  }

  /** @param {string} name @param {string} value */
  fact(name, value) {
    this.#facts.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  }

  /**
   * Says something where it is shown what survives.
   *
   * @param {string} said
   * @param {boolean} [again] whether that can be asked now
   */
  note(said, again = false) {
    if (document.activeElement === this.survive) this.#survived.focus(); // hiding the button would drop the focus
    this.#isChecked = false;
    this.survive.hidden = !again;
    this.#survived.replaceChildren(said);
  }

  /** @param {Survival[]} survivals */
  showSurvivals(survivals) {
    this.note("");
    this.#isChecked = true;
    this.#survived.replaceChildren(make("ul", {}, ...survivals.map(survival)));
  }

  /** @param {"waiting" | "answering" | "complete" | "failed" | "given up"} state */
  #become(state) {
    this.#state = state;
    this.#text.setAttribute("aria-busy", String(state === "waiting" || state === "answering"));
    this.#say(state === "complete" ? this.#ended : state);
  }

  /** What is said of an answer that is complete, or as complete as the limit lets it be. */
  get #ended() {
    return isCut(this.#pieces) ? "cut at the limit of tokens" : "complete";
  }

  /** @param {string} status */
  #say(status) {
    if (this.#status.textContent !== status) this.#status.textContent = status;
  }
}

/** @param {Survival} survival */
function survival({ name, kept, total, lost, refusal }) {
  if (refusal !== undefined) return make("li", {}, `${name}: ${refusal}`);
  const said = `${name}: ${kept} of ${total} own answers${lost ? ", lost" : ""}`;
  return make("li", lost ? { className: "error" } : {}, said);
}
