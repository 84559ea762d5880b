// What the page's modules share.

export const $ = (id) => document.getElementById(id);

export function element(name, properties = {}, ...inside) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...inside);
  return made;
}

export function seconds(milliseconds) {
  return `${Math.max(1, Math.ceil(milliseconds / 1000))} s`;
}

export function clock(milliseconds) {
  const whole = Math.floor(milliseconds / 1000);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
