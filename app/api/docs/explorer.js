// Starts Swagger UI, with errors, headers and schemas folded away.
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

SwaggerUIBundle({
  url: explorer.dataset.document,
  domNode: explorer,
  plugins: [folded],
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  persistAuthorization: false,
  tryItOutEnabled: true,
  validatorUrl: null,
});
