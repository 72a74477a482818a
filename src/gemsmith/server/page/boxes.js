// Places in a reply, drawn over the picture: {"box_2d": [y0, x0, y1, x1]} and {"point": [y, x]},
// in thousandths of the picture, y first. The spellings are those of gemsmith's text/boxes.py.

import { h } from "./dom.js";

const SCALE = 1000;
const KEYS = ["box_2d", "bbox_2d", "bbox", "box", "bounding_box", "point", "point_2d"];
const LABELS = ["label", "name", "class", "object", "text", "description"];
const MOST = 500; // a picture with more is not readable

/** The boxes and points of a text: {top, left, bottom, right, label}; a point has no extent. */
export function places(text) {
  const found = [];
  // Innermost objects one by one, so that an answer cut short gives what it has.
  for (const [raw] of text.matchAll(/\{[^{}]*\}/g)) {
    const place = read(raw);
    if (place && found.push(place) === MOST) break;
  }
  return found;
}

function read(raw) {
  let given;
  try {
    given = JSON.parse(raw);
  } catch {
    return null;
  }
  const numbers = given[KEYS.find((key) => key in given)];
  const isPlace =
    Array.isArray(numbers) &&
    [2, 4].includes(numbers.length) &&
    numbers.every((n) => typeof n === "number" && n >= 0 && n <= SCALE);
  if (!isPlace) return null;
  const [y0, x0, y1 = y0, x1 = x0] = numbers;
  const label = given[LABELS.find((key) => typeof given[key] === "string")] ?? "";
  return {
    top: Math.min(y0, y1),
    left: Math.min(x0, x1),
    bottom: Math.max(y0, y1),
    right: Math.max(x0, x1),
    label,
  };
}

/**
 * The last of the pictures with the places over it. The models' format of places names no picture,
 * so where there are several the caption says which one was taken.
 */
export function drawn(pictures, found) {
  const { preview, name } = pictures.at(-1);
  const over = found.map(({ top, left, bottom, right, label }) => {
    const isPoint = top === bottom && left === right;
    const mark = h("div", { class: isPoint ? "point" : "box" }, h("span", {}, label));
    const percent = (value) => `${(value * 100) / SCALE}%`;
    mark.style.top = percent(top);
    mark.style.left = percent(left);
    if (!isPoint) {
      mark.style.height = percent(bottom - top);
      mark.style.width = percent(right - left);
    }
    if (top < 60) mark.classList.add("low"); // no room for the label above
    return mark;
  });
  const count = found.length === 1 ? "1 place" : `${found.length} places`;
  const which = pictures.length > 1 ? `, the last of ${pictures.length} pictures` : "";
  return h(
    "figure",
    { class: "places" },
    h("div", {}, h("img", { src: preview, alt: name }), ...over),
    h("figcaption", {}, `${count} in ${name}${which}`),
  );
}
