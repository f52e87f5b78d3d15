// Pictures unlike those that an adapter learned from: whether to ask for the mark, and what is shown of it.

import { keep, kept } from "./asking.js";
import { at, element, percent } from "./showing.js";

const LEVEL = 0.05; // so few pictures like those of the training are marked

/** Whether an adapter can mark pictures, which takes enough validation images. */
const marks = ({ unlike_from: from }) => from !== undefined && from <= LEVEL;

/** Whether the user wants the mark, which is only offered where an adapter can. */
export const wanted = () => at("unlike").checked && !at("mark").hidden;

/** Whether an adapter is to be asked for the mark. */
export const asked = (about) => wanted() && marks(about);

/** Whether an answer lacks the mark that is wanted. */
export const unmarked = (answer, about) => asked(about) && answer.as_far === undefined;

export function addMark(parameters, adapters) {
  if (adapters.length && adapters.every(asked)) parameters.set("unlike", LEVEL);
}

/** Let the user choose, where an adapter can mark. */
export function offer(adapters) {
  at("mark").hidden = !adapters.some(marks);
}

export function listen(changed) {
  at("unlike").checked = kept("unlike") === "yes"; // only now: another tab may choose otherwise later
  at("unlike").addEventListener("change", () => {
    keep("unlike", at("unlike").checked ? "yes" : "no");
    changed();
  });
}

/** What stands on a card of the mark: beside the adapter's name, and in words. */
export function markOf(answer, about) {
  if (!wanted()) return {};
  if (!marks(about)) return { words: element("p", "This adapter cannot mark unlike pictures.", "soft") };
  if (answer.as_far === undefined) return {};
  const words = `Of pictures like those it learned from, ${percent(answer.as_far)} are as unlike as this one.`;
  return { badge: answer.unlike ? element("span", "unlike its training", "badge") : null, words: element("p", words, "soft") };
}
