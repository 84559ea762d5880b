// Starts Swagger UI: errors, headers and schemas folded away, the last call's id filled in, curl to copy.
const explorer = document.getElementById("explorer");

const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

function folded({ React: { createElement } }) {
  const fold = (title, ...inside) =>
    createElement("details", { className: "folded" }, createElement("summary", null, title), ...inside);
  return {
    wrapComponents: {
      // An operation's successful responses first, then its errors, which may be a dozen.
      responses: (Responses) => (props) => {
        const isError = (_, status) => status >= "400";
        const errors = props.responses.filter(isError);
        return createElement(
          "div",
          null,
          createElement(Responses, { ...props, responses: props.responses.filterNot(isError) }),
          fold(
            `Errors: ${[...errors.keys()].join(", ")}`,
            createElement(Responses, { ...props, responses: errors, tryItOutResponse: null }),
          ),
        );
      },
      headers: (Headers) => (props) => fold("Headers", createElement(Headers, props)),
    },
  };
}

function copyAsCurl({ React: { createElement, useState } }) {
  return {
    wrapComponents: {
      curl: (Curl) => (props) => {
        const [label, setLabel] = useState("Copy as curl");
        const copy = async ({ currentTarget }) => {
          const line = currentTarget.parentElement.querySelector(".curl");
          try {
            await navigator.clipboard.writeText(line.innerText);
            setLabel("Copied");
          } catch {
            getSelection().selectAllChildren(line); // no clipboard over plain http
            setLabel("Selected: press Ctrl+C");
          }
          setTimeout(() => setLabel("Copy as curl"), 2000);
        };
        return createElement(
          "div",
          null,
          createElement(Curl, props),
          createElement("button", { type: "button", className: "btn copy-curl", onClick: copy }, label),
        );
      },
    },
  };
}

/** Fills the id of a call that has just been started into each `{call}`. */
function fillIn(answer) {
  const call = answer.headers?.location?.split("/").at(-1);
  if (answer.status === 201 && call) {
    const { specActions, specSelectors } = ui.getSystem();
    for (const [path, operations] of Object.entries(specSelectors.specJson().toJS().paths)) {
      if (!path.includes("{call}")) continue;
      for (const method of Object.keys(operations)) specActions.changeParam([path, method], "call", "path", call, false);
    }
  }
  return answer;
}

const ui = SwaggerUIBundle({
  url: explorer.dataset.document,
  domNode: explorer,
  plugins: [folded, copyAsCurl],
  responseInterceptor: fillIn,
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  persistAuthorization: false,
  tryItOutEnabled: true,
  validatorUrl: null,
});
