/**
 * Attributes: `agent`, `broker` (its address), `livekit` (livekit-client's address), `variables`, `metadata` and `strings` (JSON),
 * `label` (the button's first word), `transcript` (show what is said). Parts: box, row, button, orb, label, mute, leave, bar, time,
 * status, error, retry, lines. Events: `phase`, and the call's own as `oneinbox-change`, `-ending`, `-end`, `-speech`, `-error`,
 * which bubble.
 */
export class OneInboxCallElement extends HTMLElement {
    static observedAttributes: string[];
    /** @type {Call | null} */ call: Call | null;
    /** @type {Phase} */ phase: Phase;
    /** @type {BrokerError | null} */ error: BrokerError | null;
    /** @param {Broker | string | URL | null} given */
    set broker(given: Broker | string | URL | null);
    /** For logins: `element.broker = new Broker({ token })`. An address is taken, too: frameworks set it for the attribute.
     * @returns {Broker | null} */
    get broker(): Broker | null;
    set options(given: StartOptions & JoinOptions);
    /** What attributes cannot say. @type {StartOptions & JoinOptions} */
    get options(): StartOptions & JoinOptions;
    /** @param {Record<string, string> | string | null} words */
    set strings(words: Record<string, string> | string | null);
    /** Words in place of the element's own; as JSON, too. @returns {Record<string, string>} */
    get strings(): Record<string, string>;
    connectedCallback(): void;
    disconnectedCallback(): void;
    /** @param {string} name @param {string | null} _ @param {string | null} value */
    attributeChangedCallback(name: string, _: string | null, value: string | null): void;
    /** Start a call, or go back to the running one, as a click on the button does. */
    start(): Promise<void>;
    /** Hang up, or stop trying. */
    hangUp(): Promise<void>;
    #private;
}
export type Call = import("./client.js").Call;
export type CallEvents = import("./client.js").CallEvents;
export type Line = import("./client.js").Line;
export type Speech = import("./client.js").Speech;
export type StartOptions = import("./client.js").StartOptions;
export type JoinOptions = import("./client.js").JoinOptions;
export type Phase = "idle" | "asking" | "connecting" | "talking" | "hangingUp" | "ended" | "refused" | "resumable";
import { BrokerError } from "./client.js";
import { Broker } from "./client.js";

declare global {
    interface HTMLElementTagNameMap {
        "oneinbox-call": OneInboxCallElement;
    }
}
