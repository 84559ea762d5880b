/**
 * Start, show and end one call. It hangs up when the component is gone.
 * @param {Broker} broker one for the whole page, made outside of components
 * @param {{ join?: boolean }} [options] `join: false` where the page joins the room itself
 */
export function useCall(broker: Broker, options?: {
    join?: boolean;
}): {
    start: (options?: TalkOptions | {
        nativeEvent: Event;
    }) => Promise<Call | null>;
    hangUp: () => Promise<void>;
    state: "idle" | "starting" | "running" | "ended";
    call: Call | null;
    /**
     * OneInbox's: `queued`, `in_progress` …
     */
    status: string | null;
    secondsLeft: number | null;
    muted: boolean;
    error: BrokerError | Error | null;
};
export type Broker = import("./client.js").Broker;
export type Call = import("./client.js").Call;
export type BrokerError = import("./client.js").BrokerError;
export type TalkOptions = import("./client.js").StartOptions & import("./client.js").JoinOptions;
export type Snapshot = {
    state: "idle" | "starting" | "running" | "ended";
    call: Call | null;
    /**
     * OneInbox's: `queued`, `in_progress` …
     */
    status: string | null;
    secondsLeft: number | null;
    muted: boolean;
    error: BrokerError | Error | null;
};

import type { DetailedHTMLProps, HTMLAttributes } from "react";
import type { OneInboxCallElement } from "./element.js";
type Attribute = "agent" | "livekit" | "variables" | "metadata" | "strings" | "label";
declare module "react" {
    namespace JSX {
        interface IntrinsicElements {
            "oneinbox-call": DetailedHTMLProps<HTMLAttributes<OneInboxCallElement>, OneInboxCallElement> &
                Partial<Record<Attribute, string>> & { broker?: string | Broker; transcript?: boolean };
        }
    }
}
