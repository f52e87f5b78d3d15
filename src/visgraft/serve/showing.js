// What answers, adapters and words look like. Names and labels are only ever text.

const THRESHOLD = 0.5; // of images with several classes, as visgraft predict
const REST = 5; // further classes named in short
const UNSEEN = /[\p{Cc}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]+/gu; // would change how the rest of a sentence reads
export const at = (id) => document.getElementById(id);
export const number = new Intl.NumberFormat("en");

export function counted(count, one, many = `${one}s`) {
  return `${number.format(count)} ${count === 1 ? one : many}`;
}

export function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

export function percent(share) {
  if (share < 0.0005) return "< 0.1 %";
  return `${(100 * share).toFixed(1)} %`;
}

export function inSentence(text) {
  const plain = text.replace(UNSEEN, " ").trim();
  return plain.length > 60 ? `${[...plain].slice(0, 60).join("")}…` : plain;
}

export function element(tag, text, name) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function pairsOf(entries) {
  return entries.map(([name, value]) => {
    const pair = document.createElement("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  });
}

function shares(classes) {
  const list = element("ol", "", "shares");
  list.append(...classes.map(({ label, score }) => {
    const item = document.createElement("li");
    const bar = element("span", "", "bar");
    bar.setAttribute("aria-hidden", "true");
    bar.appendChild(element("i", "")).style.width = `${100 * score}%`;
    item.append(element("span", label, "name"), element("span", percent(score), "share"), bar);
    return item;
  }));
  return list;
}

function inShort(classes, outputs) {
  const line = element("p", "Less likely: ", "soft");
  classes.slice(0, REST).forEach(({ label, score }, i) => line.append(i ? ", " : "", element("span", label, "name"), ` ${percent(score)}`));
  const more = outputs - Math.min(classes.length, REST);
  if (more > 0) line.append(` and ${counted(more, "class", "classes")} more`);
  return line;
}

/** What is asked of a picture, with what is answered: the one question of most adapters, or each task. */
function questionsOf(answer, { tasks = [], multi_label: several, outputs }) {
  if (!tasks.length) return [{ several, outputs, classes: answer.classes }];
  return tasks.map(({ name, kind, outputs }) => ({ task: name, several: kind === "several_classes", outputs, ...answer.tasks[name] }));
}

export const answered = ({ classes, tasks }) => Boolean(classes?.length || tasks);

function measured({ value, unit }) {
  const digits = Math.abs(value) < 1e4 ? 4 : 6;
  return `${new Intl.NumberFormat("en", { maximumSignificantDigits: digits }).format(value)} ${unit}`.trim();
}

const overThreshold = (classes) => classes.filter((one) => one.score >= THRESHOLD);

/** An answer in short: what it is, and how probable. */
function brief({ several, classes, ...number }) {
  if (!classes) return [measured(number), ""];
  const best = several ? overThreshold(classes) : classes.slice(0, 1);
  if (!best.length) return ["no class", ""];
  return [best[0].label, percent(best[0].score) + (best.length > 1 ? ` and ${best.length - 1} more` : "")];
}

/** An answer at length, as elements. */
function atLength({ several, outputs, classes, ...number }, top) {
  if (!classes) return [element("p", measured(number), "number")];
  if (!several) return [shares(classes.slice(0, top))];
  const over = overThreshold(classes);
  const said = element("p", over.length ? "Each class by itself:" : `No class reaches ${percent(THRESHOLD)}.`, "soft");
  const rest = classes.slice(over.length);
  return [said, shares(over), ...(rest.length ? [inShort(rest, outputs - over.length)] : [])];
}

/** What one adapter says of a picture; `mark` is what is shown of its being unlike the training's. */
export function card(answer, about, few, top, mark) {
  const { name } = about;
  const made = document.createElement("details");
  made.open = few;
  const summary_ = made.appendChild(document.createElement("summary"));
  const from = summary_.appendChild(element("span", name, "name clamp from"));
  from.title = `${name}\nsha256 ${answer.digest}`;
  if (mark.badge) summary_.append(" ", mark.badge);
  for (const question of questionsOf(answer, about)) {
    const [what, share] = brief(question);
    const short = summary_.appendChild(element("span", "", "best"));
    if (question.task !== undefined) {
      short.append(element("span", question.task, "task name"));
      made.append(element("h4", question.task, "name"));
    }
    short.append(element("span", what, "name"), element("span", share, "share"));
    made.append(...atLength(question, top));
  }
  if (mark.words) made.append(mark.words);
  return made;
}

export function thumbnail(picture) {
  const image = document.createElement("img");
  image.alt = "";
  image.decoding = "async";
  image.src = picture.url;
  image.addEventListener("error", () => image.replaceWith(element("span", "no preview", "blank")));
  return image;
}

/** The kind of an adapter's answers, in a few words. */
export function kindOf({ outputs, multi_label: several, tasks = [] }) {
  if (tasks.length) return counted(tasks.length, "task");
  return `${counted(outputs, "class", "classes")}${several ? ", several per picture" : ""}`;
}

function labelOf({ name, kind, classes, unit, low, high }) {
  if (kind === "number") return `${name}: a number, ${measured({ value: low, unit: "" })} to ${measured({ value: high, unit })} in training`;
  return `${name}: ${kind === "one_class" ? "one" : "any"} of ${classes.join(", ")}`;
}

export function aboutAdapter({ digest, classes, figures, tasks = [] }, place) {
  const code = element("code", digest.slice(0, 12));
  code.title = digest;
  const line = element("p", "sha256 ");
  line.append(code);
  const list = element("ul", "", "labels");
  list.tabIndex = 0;
  list.setAttribute("aria-label", tasks.length ? "Tasks" : "Classes");
  list.append(...(tasks.length ? tasks.map(labelOf) : classes).map((label) => element("li", label, "name")));
  const told = element("dl", "");
  told.append(...pairsOf(figuresOf(figures)));
  place.append(line, told, classes.length ? list : element("p", "Its classes have no names.", "soft"));
}

function figuresOf(figures) {
  const inFigures = (value) => typeof value !== "number" ? String(value) : Number.isInteger(value) ? number.format(value) : value.toFixed(3);
  return Object.entries(figures).filter(([, value]) => value !== null && value !== "").flatMap(([name, value]) => {
    const called = name.replaceAll("_", " ");
    if (Array.isArray(value)) return [[called, value.map(inFigures).join(" to ")]];
    if (typeof value === "object") return figuresOf(value).map(([inner, one]) => [`${called} ${inner}`, one]);
    return [[called, inFigures(value)]];
  });
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

export function showFacts({ decode, wait, forward, all }) {
  const named = { "Pictures read in": decode, "waited for the model": wait, "computed in": forward, "there and back": all };
  const found = Object.entries(named).filter(([, value]) => value !== undefined);
  at("facts").textContent = `${found.map(([name, value]) => `${name} ${number.format(Math.round(value))} ms`).join(", ")}.`;
  at("facts").hidden = false;
}

/** What each of a few adapters answers, in short; `about` has their facts by name. `marked`: also what is unlike. */
export function bestInWords(answers, about, marked) {
  const said = answers.map((answer) => {
    const words = questionsOf(answer, about.get(answer.adapter)).map((question) => {
      const [what, share] = brief({ ...question, several: question.several && question.task !== undefined });
      return [...(question.task === undefined ? [] : [inSentence(question.task)]), `${inSentence(what)}${share && `, ${share}`}`].join(" ");
    });
    return `${inSentence(answer.adapter)}: ${words.join("; ")}${marked && answer.unlike ? ", of a picture unlike its training's" : ""}`;
  });
  return `${said.join("; ")}.`;
}

/** The words of the command that asks the same; the token is only named. */
export function commandParts(address, names, token) {
  const files = names.length ? names : ["picture.jpg"];
  return [
    "curl", ...(token ? ["-H", '"Authorization: Bearer $TOKEN"'] : []),
    ...files.flatMap((name) => ["-F", quoted(`image=@"${name.replace(/[\\"]/g, "\\$&")}"`)]),
    quoted(address),
  ];
}
