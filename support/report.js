"use strict";

const PAGE = 20; // groups shown at first, and with each click on "show more groups"
const LONG = 4000; // characters (or tokens) of a text that are shown before one asks for all of it
const MOST_BOXES = 100; // boxes of an answer that are drawn

const at = id => document.getElementById(id);
const value = id => at(id).value;
const log = JSON.parse(at("log").textContent);
let chosen = []; // [group, its rows that match the controls], the newest first
let done = 0; // how many of them are on the page

function number(x) {
  return x == null ? "none" : String(+x.toFixed(3));
}

// The only way onto the page: what a model wrote is appended as text, never as HTML.
function make(tag, name, ...content) {
  const node = document.createElement(tag);
  node.className = name;
  node.append(...content);
  return node;
}

// The beginning of a long text, and a button for all of it; parts(size) gives nodes or strings.
function long(text, parts) {
  const node = make("div", "text", ...parts(LONG));
  node.dir = "auto";
  if (text.length <= LONG) return node;
  const count = text.length.toLocaleString("en");
  const button = make("button", "", "show all of " + count + " characters");
  button.onclick = () => {
    button.remove();
    node.replaceChildren(...parts(Infinity));
  };
  return make("div", "", node, button);
}

// The text with <think> and <answer> set off.
function tagged(text) {
  const parts = text.split(/(<\/?(?:think|answer)>)/); // every second one is a tag
  return parts.map((part, i) => (i % 2 ? make("span", "tag", part) : part));
}

// Each token over a shade: none at probability 1, the darkest at 0. With gaps between them, for
// tokens that are decoded one by one often lack the spaces of the text.
function tokens({pieces, logps}, size) {
  return pieces.slice(0, size).flatMap((piece, i) => {
    const probability = logps[i] == null ? null : Math.exp(logps[i]);
    const node = make("span", "token", piece);
    node.title = "probability " + number(probability);
    node.style.background = "rgb(150 90 220 / " + 0.7 * (1 - (probability ?? 1)) + ")";
    return [node, make("wbr", "")];
  });
}

// A picture with the gold boxes and those of an answer, in pixels of the original picture.
function picture([width, height, png], gold, said) {
  const image = make("img", width < 200 ? "small" : "");
  image.src = "data:image/png;base64," + png;
  image.alt = "picture of the question";
  const frame = make("div", "picture", image);
  const draw = (name, [x1, y1, x2, y2]) => {
    const sides = [y1 / height, 1 - x2 / width, 1 - y2 / height, x1 / width];
    const box = make("div", name);
    box.style.inset = sides.map(share => 100 * share + "%").join(" ");
    frame.append(box);
  };
  gold.forEach(box => draw("box", box));
  said.forEach(box => draw("box said", box));
  return frame;
}

// "med-rlvr 1 + leak 1 × -0.5, accuracy 1, format 1": the paper's reward, what guards and recitation
// add to it, and then the other parts.
function earned({reward, parts}) {
  const added = Object.keys(log.terms).filter(name => log.terms[name] && parts[name]);
  const paid = added.reduce((rest, name) => rest - log.terms[name] * parts[name], reward);
  const sum = [log.reward + " " + number(paid)];
  for (const name of added)
    sum.push(name + " " + number(parts[name]) + " × " + number(log.terms[name]));
  const others = Object.keys(parts).filter(name => parts[name] && !added.includes(name));
  return [sum.join(" + "), ...others.map(name => name + " " + number(parts[name]))].join(", ");
}

// One completion.
function card(row, group, pictures) {
  const {reward, advantage, correct, finished, stage, predicted, text} = row;
  const localize = Array.isArray(group.gold);
  const tone = advantage > 0 ? "up" : advantage < 0 ? "down" : "soft";
  const dot = make("i", "");
  dot.style.background = log.colours[stage];
  const said = localize
    ? "boxes in the answer: " + predicted.length
    : "answer: " + (predicted || "none that can be read");
  const shaded = value("shade") && row.logps; // demonstrations have none: nobody sampled them
  const parts = size => (shaded ? tokens(row, size) : tagged(text.slice(0, size)));
  const node = make("article", correct ? "card right" : "card wrong",
    make("div", "head",
      make("strong", "", number(reward)),
      make("span", "mark", correct ? "✓ right" : "✗ wrong"),
      make("span", tone, "advantage " + number(advantage)),
      make("span", "cut", finished ? "" : "cut at the limit")),
    make("div", "soft", dot, stage + ", " + row.tokens + " tokens"),
    make("div", "soft", earned(row)),
    make("div", "", said));
  if (localize && pictures.length)
    node.append(picture(pictures[0], group.gold, predicted.slice(0, MOST_BOXES)));
  node.append(long(text, parts));
  return node;
}

// The prompt as one fold for each message, the last of them open.
function folds(prompt) {
  const all = prompt.map(([role, text]) =>
    make("details", "", make("summary", "", role), long(text, size => [text.slice(0, size)])));
  all[all.length - 1].open = true;
  return all;
}

// A group: what was asked, and the cards of those rows that match the controls.
function article(group, rows) {
  const pictures = log.pictures[group.id] ?? [];
  const localize = Array.isArray(group.gold);
  const right = group.rows.filter(row => row.correct).length;
  const gold = "gold: " + (localize ? JSON.stringify(group.gold) : group.gold);
  const legend = localize && pictures.length ? "solid green: gold; dashed orange: answer" : "";
  return make("article", "group",
    make("div", "top",
      make("h3", "", "step " + group.step + ", group " + group.group),
      right + " of " + group.rows.length + " right",
      make("span", "soft", group.id)),
    make("div", "asked",
      ...pictures.map(each => picture(each, localize ? group.gold : [], [])),
      make("div", "words", ...folds(group.prompt),
        make("div", "gold", gold), make("div", "soft", legend))),
    make("div", "cards", ...rows.map(row => card(row, group, pictures))));
}

function more(count) {
  const next = chosen.slice(done, done + count);
  at("groups").append(...next.map(([group, rows]) => article(group, rows)));
  done += next.length;
  const matching = chosen.reduce((sum, [, rows]) => sum + rows.length, 0).toLocaleString("en");
  at("state").textContent = done + " of " + chosen.length + " groups shown, with " + matching
    + " completions that match";
  at("more").hidden = done === chosen.length;
}

// Whether x lies between the numbers of two fields; an empty field is no bound.
function within(x, low, high) {
  const above = !value(low) || (x !== null && x >= +value(low));
  const below = !value(high) || (x !== null && x <= +value(high));
  return above && below;
}

function matches(row) {
  return within(row.reward, "least", "most")
    && ["", row.correct ? "right" : "wrong"].includes(value("answer"))
    && ["", row.stage].includes(value("stage"));
}

// Filter, and show the first so many groups, the newest first.
function again(count) {
  const groups = log.groups.filter(group => within(group.step, "first", "last")).reverse();
  chosen = groups.map(group => [group, group.rows.filter(matches)]);
  chosen = chosen.filter(([, rows]) => rows.length);
  at("groups").replaceChildren();
  done = 0;
  more(count);
}

at("stage").append(...Object.keys(log.colours).map(name => new Option(name)));
at("controls").oninput = event => again(event.target.id === "shade" ? done : PAGE);
at("controls").onreset = () => setTimeout(again, 0, PAGE); // the fields are cleared after it
at("more").onclick = () => more(PAGE);
again(PAGE);
