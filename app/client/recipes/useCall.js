import { useEffect, useState } from "react";
import { follow } from "./follow.js";

/** The call as the broker sees it, or null while nothing is known. */
export function useCall(call) {
  const [state, setState] = useState(null);
  useEffect(() => {
    setState(null);
    if (call) return follow(call, setState);
  }, [call]);
  return state;
}
