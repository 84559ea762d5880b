import { Broker } from "oneinbox-broker-client";

const broker = new Broker({ url: "http://127.0.0.1:8000" });
const [button, status] = document.querySelectorAll("#talk, #status");
let call = null;

button.addEventListener("click", async () => {
  if (call && !call.ended) return call.hangUp();
  button.disabled = true;
  try {
    call = await broker.talk({ agent: "default", variables: { customer_name: "Ada" } });
    button.textContent = "Hang up";
    call.on("change", ({ detail }) => (status.textContent = detail.status));
    call.on("end", () => (button.textContent = "Talk"));
  } catch (error) {
    status.textContent = error.message;
  }
  button.disabled = false;
});
