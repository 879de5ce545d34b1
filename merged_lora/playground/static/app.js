// The page: what moves when somebody moves a control.

import { Answers } from "./answers.js";
import { Copies } from "./copies.js";
import { byId, pause } from "./dom.js";
import { Field } from "./field.js";
import { Kept } from "./kept.js";
import { Position } from "./position.js";
import { Server, ServerError } from "./server.js";

/**
 * @typedef {import("./answers.js").Merge} Merge
 * @typedef {import("./server.js").Form} Form
 * @typedef {import("./server.js").Question} Question
 * @typedef {import("./server.js").Served} Served
 */

/** Milliseconds for which a control must rest before its merge is asked. */
const REST = 80;

const server = new Server(new URL(".", location.href));
const trouble = byId("trouble", HTMLParagraphElement);
addEventListener("error", (event) => showTrouble(event.message));
addEventListener("unhandledrejection", (event) => showTrouble(String(event.reason?.message ?? event.reason)));

const about = await server.about();
const given = new URLSearchParams(location.hash.slice(1));

const place = (/** @type {string} */ id) => byId(id, HTMLElement);
const position = new Position(about.strategies, {
  strategy: place("strategy"),
  sources: place("sources"),
  adding: place("adding"),
  options: place("options"),
  more: place("more-options"),
});
const spec = new Field({
  label: "Spec",
  placeholder: "the controls make no merge",
  lines: 3,
  id: "spec-text",
  help: "what a request names as its model",
});
const prompt = new Field({ label: "Prompt", lines: 2, id: "prompt-text", value: given.get("prompt") ?? "" });
const kind = new Field({
  label: "As",
  id: "kind",
  choices: [
    ["chat", "a chat"],
    ["completion", "a text to go on with"],
  ],
});
const temperature = new Field({
  label: "Temperature",
  id: "temperature",
  placeholder: "0",
  range: { min: 0, max: 2, step: 0.1 },
});
const tokens = new Field({
  label: "Tokens at most",
  id: "tokens",
  placeholder: "64",
  range: { min: 1, max: 512, step: 1 },
});
const against = new Field({ label: "Mark words that differ from", id: "against-name", choices: [] });

place("spec").append(spec.element);
place("prompt").append(prompt.element);
place("knobs").append(kind.element, temperature.element, tokens.element);
place("against").append(against.element);

const live = byId("live", HTMLInputElement);
const sure = byId("sure", HTMLInputElement);
const stop = byId("stop", HTMLButtonElement);
const answers = new Answers(place("cards"), server);

/** @type {Served | null} */
let served = null;
/** The merge of the controls; null while they make none. @type {Merge | null} */
let merge = null;
/** Resolves when `merge` is that of the controls as they are now. */
let settling = Promise.resolve();
/** Whether somebody has asked, so that the merge is asked anew as it changes. */
let hasAsked = false;
/** The answer with which the user wants the merge's to be compared; empty for that of most weight,
 * and of those of equal weight the nearest. */
let chosen = "";
/** Whether a first merge has been shown, or somebody was faster. */
let hasBegun = false;
/** The merge, by its spec, that was asked last. */
let askedSpec = "";
let moving = new AbortController();

const copies = new Copies(place("copies"), server, currentSpec, question);
const kept = new Kept(server, currentSpec, question);

position.addEventListener("change", () => moved(() => position.form));
spec.addEventListener("change", () => moved(meantByText));
spec.element.addEventListener("focusout", () => {
  if (merge) spec.text = merge.spec;
});
kept.addEventListener("chosen", (event) => {
  spec.text = detail(event);
  moved(meantByText);
});
kept.addEventListener("comparing", () => {
  answers.stop();
  answers.isHeld = true;
});
kept.addEventListener("compared", () => {
  answers.isHeld = false;
  if (merge?.spec !== askedSpec) askLive(); // the position has changed meanwhile
});
copies.addEventListener("defined", () => refresh());
for (const each of ["asking", "checking"]) {
  answers.addEventListener(each, () => {
    stop.disabled = false;
  });
}
answers.addEventListener("asking", () => {
  against.choices = answers.names;
  if (!answers.names.includes(chosen)) chosen = "";
  answers.candidates = chosen ? [chosen] : position.heaviest;
  against.text = answers.against;
});
answers.addEventListener("settled", () => {
  against.text = answers.against;
  if (document.activeElement === stop) byId("ask", HTMLButtonElement).focus(); // disabling it drops the focus
  stop.disabled = true;
});
for (const each of [answers, copies]) {
  each.addEventListener("refused", (event) => {
    const { spec: refused, error } = detail(event);
    if (refused === merge?.spec || !error.isOfRequest) placeError(error);
  });
}
against.addEventListener("change", () => {
  chosen = against.text;
  answers.candidates = [chosen];
});
sure.addEventListener("change", () => {
  answers.sure = sure.checked;
  byId("sure-hint", HTMLParagraphElement).hidden = !sure.checked;
});
stop.addEventListener("click", () => answers.stop());
byId("asking", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
});
byId("connecting", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  connect();
});

await connect();

/** Takes the key that was typed, and learns what the server has. */
async function connect() {
  const key = byId("key", HTMLInputElement).value.trim();
  if (/[^\x21-\x7e]/.test(key)) return showTrouble("a key holds letters, digits and signs of ASCII alone");
  server.key = key;
  byId("server", HTMLParagraphElement).textContent = `${server.at}, merged-lora ${about.version}`;
  await refresh();
}

/** Learns what the server has and, the first time, shows a merge of it. */
async function refresh() {
  try {
    const found = await server.served();
    served = found;
    trouble.hidden = true;
    position.adapters = found.adapters;
    copies.mayDefine = found.runtimeAliases;
    copies.aliases = found.aliases;
    kept.models = [...found.adapters, ...found.aliases].map(({ name }) => name).concat(found.base);
    const first = given.get("spec") || firstSpec(found);
    if (hasBegun || !first) return;
    spec.text = first;
    moved(meantByText);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    showTrouble(error.message);
    byId("access", HTMLDetailsElement).open = true;
  }
}

/** The spec that is written, or that of the alias that is. */
function meantByText() {
  const alias = served?.aliases.find(({ name }) => name === spec.text.trim());
  return { spec: alias?.spec ?? spec.text };
}

/** The merge that the page begins with. @param {Served} served */
function firstSpec({ aliases, adapters }) {
  if (aliases[0]) return aliases[0].spec;
  const names = adapters.filter((each) => !each.refusal).map((each) => JSON.stringify(each.name));
  return names.length > 1 ? `ties(${names.slice(0, 2).join(", ")})` : names[0] ? `linear(${names[0]})` : "";
}

/**
 * Shows what the controls, or the text of the spec, mean; once they rest, asks that merge if it is live.
 *
 * @param {() => Form | {spec: string}} meant
 */
function moved(meant) {
  hasBegun = true;
  moving.abort();
  moving = new AbortController();
  const { signal } = moving;
  if (live.checked) answers.stop();
  position.clearErrors();
  spec.error = null;
  spec.busy = true;
  copies.clear();
  merge = null;
  const rested = pause(REST, signal).then(
    () => true,
    () => false,
  );
  settling = settle(meant(), signal, rested);
  Promise.all([settling, rested]).then(() => {
    if (!signal.aborted && !kept.isComparing) askLive();
  });
}

/**
 * @param {Form | {spec: string}} form
 * @param {AbortSignal} signal
 * @param {Promise<boolean>} rested whether the controls rest
 */
async function settle(form, signal, rested) {
  try {
    const found = await server.form(form, signal);
    merge = { spec: found.spec, names: found.form.sources.map(({ name }) => name) };
    const isText = "spec" in form;
    if (isText) position.load(found.form);
    if (!isText || document.activeElement?.id !== "spec-text") spec.text = found.spec;
    if (served) trouble.hidden = true;
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof ServerError)) throw error;
    if (!(await rested)) return; // somebody types
    if (!("spec" in form)) spec.text = "";
    placeError(error);
  } finally {
    if (!signal.aborted) spec.busy = false;
  }
}

/** The merge of the controls once they have settled; null if they make none. */
async function current() {
  for (let last = null; last !== settling; ) {
    last = settling;
    await last;
  }
  return merge;
}

async function currentSpec() {
  return (await current())?.spec ?? null;
}

/** Asks all answers for what the question now is; if something is wrong with it, shows where. */
async function ask() {
  const [found, asked] = [await current(), question()];
  prompt.error = prompt.text.trim() ? null : "type a prompt";
  if (!served) return showTrouble(`not connected to ${server.at}; Connect, under Access, tries again`);
  if (!found || !asked || !prompt.text.trim()) {
    const wrong = document.querySelector("[aria-invalid]");
    wrong?.closest("details")?.setAttribute("open", "");
    if (wrong instanceof HTMLElement) wrong.focus();
    return;
  }
  hasAsked = true;
  kept.stop();
  send(found, asked);
}

/** Asks all answers if the merge is asked anew as it changes. */
function askLive() {
  if (!hasAsked || !live.checked || !merge || !prompt.text.trim()) return;
  const asked = question();
  if (asked) send(merge, asked);
}

/** @param {Merge} found @param {Question} asked */
function send(found, asked) {
  if (!served) return;
  askedSpec = found.spec;
  trouble.hidden = true;
  position.clearErrors();
  for (const field of [spec, prompt]) field.error = null;
  const models = new Set([...served.adapters, ...served.aliases].map(({ name }) => name));
  // A source that is no model of its own, such as a folder, answers as the merge of itself.
  const modelOf = (/** @type {string} */ name) => (models.has(name) ? name : `sum(${JSON.stringify(name)})`);
  answers.ask(found, modelOf, served.base, asked);
}

/** The question; null if one of its numbers is none, which then says so. @returns {Question | null} */
function question() {
  const heat = numberIn(temperature, (number) => number >= 0, "a number from 0");
  const most = numberIn(tokens, (number) => Number.isInteger(number) && number > 0, "a whole number above 0");
  if (heat === null || most === null) return null;
  return { prompt: prompt.text, chat: kind.text === "chat", temperature: heat, max_tokens: most };
}

/**
 * @param {Field} field
 * @param {(number: number) => boolean} isUsable
 * @param {string} what
 */
function numberIn(field, isUsable, what) {
  const number = Number(field.text.trim() || field.usual);
  const usable = Number.isFinite(number) && isUsable(number);
  field.error = usable ? null : `must be ${what}`;
  return usable ? number : null;
}

/**
 * Shows an error beside the control that caused it, or beside the spec; above all if no control did.
 *
 * @param {ServerError} error
 */
function placeError(error) {
  /** @type {Record<string, Field>} */
  const fields = { spec, temperature, max_tokens: tokens };
  for (const name of ["prompt", "messages", "input_text", "input_tokens"]) fields[name] = prompt;
  const named = /\(parameter=(\w+)/.exec(error.message)?.[1]; // as vLLM says it
  const field = fields[error.param ?? named ?? ""] ?? fields[named ?? ""];
  if (field) field.error = error.message;
  else if (!error.isOfRequest) showTrouble(error.message);
  else if (!position.showError(error.message, error.param)) spec.error = error.message;
}

/** @param {Event} event */
function detail(event) {
  return /** @type {CustomEvent} */ (event).detail;
}

/** @param {string} message */
function showTrouble(message) {
  trouble.textContent = message;
  trouble.hidden = false;
}
