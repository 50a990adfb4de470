// Draws answers of the command: texts as text, never as HTML; rows into the charts.
const PERIOD = 1000; // milliseconds between two questions
const NUMBERS = ["step", "loss", "top1", "images/s", "MFU", "GiB", "ETA", "looks", "skipped",
                 "newest line"];
const at = (id) => document.getElementById(id);
const known = { version: "", shape: "" };
let view = null;

function element(tag, text, kind) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function showTable(runs) {
  const shown = NUMBERS.filter((name) => runs.some((run) => !["-", "0"].includes(run[name])));
  const head = document.createElement("tr");
  const text = ["run", "state", "job"];
  const columns = ["run", "state", ...shown, "job"];
  head.append(...columns.map((name) => element("th", name, text.includes(name) ? "text" : "")));
  at("head").replaceChildren(head);
  at("rows").replaceChildren(...runs.map((run) => {
    const row = document.createElement("tr");
    row.append(...columns.map((name) => {
      const value = name === "run" ? run.label : run[name];
      const cell = element("td", value, text.includes(name) ? `text ${name}` : "");
      if (name === "run") {
        const swatch = element("span", "", "swatch");
        swatch.style.background = run.colour;
        cell.prepend(swatch);
        cell.title = run.directory;
      } else if (name === "step" && run.share) {
        const bar = document.createElement("progress");
        bar.value = run.share;
        cell.append(bar);
      }
      return cell;
    }));
    return row;
  }));
}

function showTexts(answer) {
  document.title = `${answer.title} · dist-looksam watch`;
  at("title").textContent = answer.title;
  at("subtitle").textContent = answer.subtitle;
  at("below").textContent = answer.below;
  showTable(answer.runs);
  const several = answer.runs.length > 1;
  const notes = answer.runs.flatMap((run) =>
    run.notes.map((note) => (several ? `${run.label}: ${note}` : note)));
  at("notes").replaceChildren(...[...answer.notes, ...notes].map((note) => element("li", note)));
  at("notes").className = at("notes").childElementCount ? "" : "empty";
  at("logs").replaceChildren(...answer.runs.filter((run) => run.log.length).map((run) => {
    const part = element("section", "", "log");
    const name = several ? `Last lines of log.txt, ${run.label}` : "Last lines of log.txt";
    part.append(element("h2", name), element("pre", run.log.join("\n")));
    return part;
  }));
}

async function showCharts(answer) {
  if (answer.spec !== undefined && answer.shape !== known.shape) {
    const box = document.createElement("div");
    let made = null;
    if (answer.spec) {
      const spec = { ...answer.spec, datasets: answer.data };
      // ast: expressions are interpreted, so that the page needs no eval.
      made = await vegaEmbed(box, spec, {
        renderer: "svg", mode: "vega-lite", ast: true,
        actions: { export: true, source: false, compiled: false, editor: false },
      });
      await made.view.signal("last", answer.last).runAsync();
    }
    at("charts").replaceChildren(box);
    if (view) view.finalize();
    view = made && made.view;
  } else if (answer.data !== undefined && view) {
    for (const [name, rows] of Object.entries(answer.data)) view.data(name, rows);
    await view.signal("last", answer.last).runAsync();
  }
  Object.assign(known, { version: answer.version, shape: answer.shape });
  document.body.dataset.version = answer.version;
}

async function ask() {
  let answer = null;
  try {
    const found = await fetch(`data?version=${known.version}&shape=${known.shape}`);
    if (!found.ok) throw new Error(found.status);
    answer = await found.json();
    at("problem").textContent = "";
  } catch {
    at("problem").textContent =
      `dist-looksam watch does not answer since ${new Date().toLocaleTimeString()}: what stands ` +
      "below is from before. Start the command again.";
    return; // another start has another address
  }
  await show(answer);
  setTimeout(ask, PERIOD);
}

async function show(answer) {
  showTexts(answer);
  try {
    await showCharts(answer);
  } catch (error) {
    console.error(error);
    at("problem").textContent = `The charts cannot be drawn: ${error.message}`;
  }
}

const start = JSON.parse(at("start").textContent);
show(start).then(() => { if (start.live) setTimeout(ask, PERIOD); });
