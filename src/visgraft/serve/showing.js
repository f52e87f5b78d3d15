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

function percent(share) {
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

/** What one adapter says of a picture. */
export function card(answer, about, few, top) {
  const { classes, digest } = answer;
  const { name, multi_label: several, outputs } = about;
  const made = document.createElement("details");
  made.open = few;
  const summary_ = made.appendChild(document.createElement("summary"));
  const from = summary_.appendChild(element("span", name, "name clamp from"));
  from.title = `${name}\nsha256 ${digest}`;
  const over = classes.filter((one) => one.score >= THRESHOLD);
  const best = several ? over : classes.slice(0, 1);
  const short = summary_.appendChild(element("span", "", "best"));
  short.append(element("span", best.length ? best[0].label : "no class", "name"));
  short.append(element("span", best.length ? percent(best[0].score) + (best.length > 1 ? ` and ${best.length - 1} more` : "") : "", "share"));
  if (several) {
    made.append(element("p", over.length ? "Each class by itself:" : `No class reaches ${percent(THRESHOLD)}.`, "soft"));
    made.append(shares(over));
    const rest = classes.slice(over.length);
    if (rest.length) made.append(inShort(rest, outputs - over.length));
  } else {
    made.append(shares(classes.slice(0, top)));
  }
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

export function aboutAdapter({ digest, classes, figures }, place) {
  const code = element("code", digest.slice(0, 12));
  code.title = digest;
  const line = element("p", "sha256 ");
  line.append(code);
  const list = element("ul", "", "labels");
  list.tabIndex = 0;
  list.setAttribute("aria-label", "Classes");
  list.append(...classes.map((label) => element("li", label, "name")));
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

/** The most probable class by each of a few adapters. */
export function bestInWords(answers) {
  const said = answers.map(({ adapter, classes: [{ label, score }] }) => `${inSentence(adapter)}: ${inSentence(label)}, ${percent(score)}`);
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
