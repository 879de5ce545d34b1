// The server: what it has, what a form means, and the answers of its models.

import { pause } from "./dom.js";

/**
 * @typedef {{type: string, minimum?: number, exclusiveMinimum?: number, maximum?: number, enum?: string[]}} Schema
 * @typedef {{name: string, default: number | string | boolean | null, per_source: boolean, help: string, schema: Schema}} Option
 * @typedef {{name: string, summary: string, rank: string, options: Option[], sources_min: number, sources_max: number | null}} Strategy
 * @typedef {{version: string, server: string | null, strategies: Strategy[]}} About
 * @typedef {{name: string, weight: string}} Source
 * @typedef {{strategy: string, sources: Source[], options: Record<string, string>}} Form
 * @typedef {{name: string, refusal: string | null}} Adapter
 * @typedef {{name: string, spec: string}} Alias
 * @typedef {{base: string, adapters: Adapter[], aliases: Alias[], runtimeAliases: boolean}} Served
 * @typedef {{prompt: string | {role: string, content: string}[], chat: boolean, temperature: number, max_tokens: number}} Question
 * @typedef {{digest: string, isNew: boolean, milliseconds: number}} Made
 * @typedef {{text: string, logprob: number | null, tokens: number, isCut?: boolean}} Piece a part with the sum
 *   over its tokens; the last one says whether the limit of tokens cut the answer
 * @typedef {{name: string, kept?: number, total?: number, lost?: boolean, refusal?: string}} Survival
 * @typedef {{rank: number, kept_energy: number | null, replay: Survival[] | null}} Merge
 */

/** Whether it is asked as a chat, as messages always are. @param {Question} question */
export function isChat({ prompt, chat }) {
  return chat || typeof prompt !== "string";
}

/** What the server says against a request. */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {number} status 0 if no server answered
   * @param {string | null} param the field that it is about
   * @param {number | null} retryAfter seconds after which it may be asked again
   */
  constructor(message, status, param = null, retryAfter = null) {
    super(message);
    this.status = status;
    this.param = param;
    this.retryAfter = retryAfter;
  }

  /** Whether the request is wrong, and not the server, the way to it, or the key. */
  get isOfRequest() {
    return this.status >= 400 && this.status < 500 && this.status !== 401;
  }
}

const EVENT_END = /\r?\n\r?\n/;

export class Server {
  /** @param {URL} page the address of the page, beside whose folder are the routes of the server */
  constructor(page) {
    this.api = new URL("api/", page);
    this.v1 = new URL("../v1/", page);
    this.key = "";
    /** The address of the API, as people know it. */
    this.at = this.v1.href.replace(/\/$/, "");
  }

  /** @returns {Promise<About>} */
  async about() {
    const about = await this.#json(new URL("about", this.api));
    this.at = about.server ?? this.at;
    return about;
  }

  /**
   * The merge that a form or a text means, in canonical form.
   *
   * @param {Form | {spec: string}} asked
   * @param {AbortSignal} signal
   * @returns {Promise<{spec: string, form: Form}>}
   */
  form(asked, signal) {
    return this.#json(new URL("form", this.api), asked, signal);
  }

  /**
   * A question to a merge, as the lines that ask it.
   *
   * @param {string} spec
   * @param {Question} question
   * @param {AbortSignal} signal
   * @returns {Promise<Record<"curl" | "python", string>>}
   */
  copies(spec, question, signal) {
    const asked = { spec, question, server: this.at, keyed: this.key !== "" };
    return this.#json(new URL("copies", this.api), asked, signal);
  }

  /**
   * The flag of `vllm serve` that gives a merge a name.
   *
   * @param {string} spec
   * @param {string} alias
   * @param {AbortSignal} signal
   * @returns {Promise<string>}
   */
  async flag(spec, alias, signal) {
    return (await this.#json(new URL("flag", this.api), { spec, alias }, signal)).flag;
  }

  /**
   * The prompts in a text.
   *
   * @param {string} text
   * @param {AbortSignal} signal
   * @returns {Promise<Question["prompt"][]>}
   */
  async prompts(text, signal) {
    return (await this.#json(new URL("prompts", this.api), text, signal)).prompts;
  }

  /**
   * The base model, its adapters and the aliases of merges.
   *
   * @returns {Promise<Served>}
   */
  async served() {
    const missing = (/** @type {string} */ what) => (/** @type {unknown} */ error) => {
      if (!(error instanceof ServerError) || error.status !== 404) throw error;
      throw new ServerError(`${what} (${error.message})`, 404);
    };
    const found = await this.#json(new URL("models", this.v1)).catch(
      missing(`there is no API at ${this.at}`),
    );
    const models = found.data;
    const way = "this server makes no merges; start it with --enable-merged-lora";
    const merged = await this.#json(new URL("merged_lora", this.v1)).catch(missing(way));
    /** @type {Alias[]} */
    const aliases = merged.aliases.map((/** @type {any} */ each) => ({
      name: each.alias,
      spec: each.spec,
    }));
    /** @type {Adapter[]} */
    const adapters = merged.sources
      .filter((/** @type {any} */ each) => each.served)
      .map((/** @type {any} */ each) => ({ name: each.name, refusal: each.refusal }));
    const known = new Set([...aliases, ...adapters].map((each) => each.name));
    const base = models.find((/** @type {any} */ each) => !each.parent && !known.has(each.id));
    if (!base) throw new ServerError("the server lists no base model", 200);
    return { base: base.id, adapters, aliases, runtimeAliases: merged.runtime_aliases === true };
  }

  /**
   * @param {string} digest
   * @param {AbortSignal} signal
   * @returns {Promise<Merge>}
   */
  merge(digest, signal) {
    return this.#json(new URL(`merged_lora/merges/${digest}`, this.v1), undefined, signal);
  }

  /**
   * Which of its sources' own answers a merge still gives.
   *
   * @param {string} spec
   * @param {AbortSignal} signal
   * @param {(said: string) => void} waiting
   * @returns {Promise<Survival[]>}
   */
  async survivals(spec, signal, waiting) {
    const url = new URL("merged_lora/check", this.v1);
    return (await patient(() => this.#json(url, { spec }, signal), signal, waiting)).sources;
  }

  /**
   * @param {string} alias
   * @param {string} spec
   * @param {AbortSignal} signal
   * @param {(said: string) => void} waiting
   */
  async define(alias, spec, signal, waiting) {
    const url = new URL(`merged_lora/${encodeURIComponent(alias)}`, this.v1);
    const reply = await patient(() => this.#json(url, { spec }, signal), signal, waiting);
    if (reply.alias !== alias)
      throw new ServerError(`${JSON.stringify(alias)} cannot be an alias`, 400, "alias");
  }

  /**
   * The answer of a model as it comes, and the merge that gives it.
   *
   * A server that asks for patience is asked again when it says, here and below.
   *
   * @param {string} model
   * @param {Question} question
   * @param {AbortSignal} signal
   * @param {(said: string) => void} waiting called with why, and for how long
   * @returns {Promise<{made: Made | null, pieces: AsyncGenerator<Piece>}>}
   */
  async answer(model, question, signal, waiting) {
    const { prompt, chat: _, ...numbers } = question;
    const messages = typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt;
    const asked = isChat(question) ? { messages, logprobs: true } : { prompt, logprobs: 1 };
    const route = new URL(isChat(question) ? "chat/completions" : "completions", this.v1);
    const body = { model, ...asked, ...numbers, stream: true };
    const reply = await patient(() => this.#fetch(route, body, signal), signal, waiting);
    return { made: made(reply.headers.get("merged-lora")), pieces: pieces(reply) };
  }

  /**
   * @param {URL} url
   * @param {unknown} [body] for POST; a text as it is, anything else as JSON
   * @param {AbortSignal} [signal]
   * @returns {Promise<any>}
   */
  async #json(url, body, signal) {
    const reply = await this.#fetch(url, body, signal);
    return await reply.json().catch((error) => {
      if (error instanceof SyntaxError) throw new ServerError(`${url} answers no JSON`, reply.status);
      throw error;
    });
  }

  /**
   * @param {URL} url
   * @param {unknown} body
   * @param {AbortSignal} [signal]
   * @returns {Promise<Response>}
   */
  async #fetch(url, body, signal) {
    /** @type {Record<string, string>} */
    const headers =
      this.key && url.href.startsWith(this.v1.href) ? { Authorization: `Bearer ${this.key}` } : {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const reply = await fetch(url, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? null : typeof body === "string" ? body : JSON.stringify(body),
      signal: signal ?? null,
    }).catch((error) => {
      if (error instanceof TypeError)
        throw new ServerError("the server does not answer; is it still running?", 0);
      if (error.name === "TimeoutError") throw new ServerError("the server does not answer in time", 0);
      throw error;
    });
    if (!reply.ok) throw await refusal(reply);
    return reply;
  }
}

/**
 * What a request gives; while the server asks for patience, it is sent again when the server says.
 *
 * @template Result
 * @param {() => Promise<Result>} request
 * @param {AbortSignal} signal
 * @param {(said: string) => void} waiting called with why, and for how long
 * @returns {Promise<Result>}
 */
async function patient(request, signal, waiting) {
  for (;;) {
    try {
      return await request();
    } catch (error) {
      if (!(error instanceof ServerError) || error.retryAfter === null) throw error;
      waiting(`${error.message}; asking again in ${error.retryAfter} s`);
      await pause(1000 * error.retryAfter, signal).catch((reason) => {
        throw reason.name === "TimeoutError" ? error : reason;
      });
    }
  }
}

/**
 * The error in a reply: OpenAI's and vLLM's form, or FastAPI's.
 *
 * @param {Response} reply
 * @returns {Promise<ServerError>}
 */
async function refusal(reply) {
  const text = await reply.text();
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    body = null;
  }
  const inner = body?.error ?? body ?? {};
  const said = typeof inner === "string" ? inner : (inner.message ?? inner.detail);
  const message = typeof said === "string" && said ? said : `the server answers status ${reply.status}`;
  const again = Number.parseInt(reply.headers.get("retry-after") ?? "", 10);
  const waits = reply.status === 429 || (reply.status === 503 && again > 0);
  const param = typeof inner.param === "string" ? inner.param : null;
  return new ServerError(message, reply.status, param, waits ? Math.max(1, again || 1) : null);
}

/**
 * What the header of a reply says of the merge that gives it.
 *
 * @param {string | null} header such as `"0a1b";new=1;ms=12.3`
 * @returns {Made | null}
 */
function made(header) {
  const found = /^"([0-9a-f]+)";new=([01]);ms=([0-9.]+)$/.exec(header ?? "");
  if (!found) return null;
  const [, digest = "", isNew, milliseconds] = found;
  return { digest, isNew: isNew === "1", milliseconds: Number(milliseconds) };
}

/**
 * The pieces of an answer, from a stream of server-sent events.
 *
 * @param {Response} reply
 * @returns {AsyncGenerator<Piece>}
 */
async function* pieces(reply) {
  const cut = new ServerError("the server stopped in the middle of this answer", 0);
  if (!reply.body) throw cut;
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let sum = 0;
  let tokens = 0;
  try {
    for (;;) {
      const part = await reader.read().catch((error) => {
        throw error instanceof TypeError ? cut : error;
      });
      if (part.done) throw cut;
      const events = (text + part.value).split(EVENT_END);
      text = events.pop() ?? "";
      for (const event of events) {
        const data = event.replace(/^data: ?/, "");
        if (data === "[DONE]") return;
        if (event.startsWith(":")) continue; // a comment, which keeps the connection open
        const body = parsed(data);
        if (body.error)
          throw new ServerError(`the server failed: ${body.error.message ?? "no reason given"}`, 500);
        const choice = body.choices?.[0];
        if (!choice) continue;
        const rated = logprobs(choice);
        tokens += rated.length;
        sum += rated.reduce((total, each) => total + each, 0);
        const said = choice.delta?.content ?? choice.text ?? "";
        const isCut = choice.finish_reason === "length";
        if (!said && !isCut) continue; // a part of a character, whose tokens count with the one that ends it
        yield { text: said, logprob: tokens ? sum : null, tokens, isCut };
        sum = 0;
        tokens = 0;
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // a stream that has failed cannot be cancelled, nor need it be
  }
}

/** @param {string} data @returns {any} */
function parsed(data) {
  try {
    return Object(JSON.parse(data));
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw new ServerError("the server sends what is not a part of an answer", 0);
  }
}

/** @param {any} choice @returns {number[]} */
function logprobs(choice) {
  const found = choice.logprobs;
  if (!found) return [];
  /** @type {(number | null)[]} */
  const all = found.content?.map((/** @type {any} */ each) => each.logprob) ?? found.token_logprobs ?? [];
  return all.filter((each) => each !== null);
}
