// What memory did to a request, read from /plugins/pacellm/answers/ID while it runs and after.

const at = (id) => document.getElementById(id);
const PLUGIN = `${location.origin}${location.pathname.replace(/[^/]*$/, "")}`;
const SERVER = PLUGIN.replace(/plugins\/pacellm\/$/, "");
const POLL_MS = 700;
const NAMES = { h: "high", m: "mid", l: "low", e: "met an empty bank", c: "from the prefix cache", n: "no memory", u: "unsound" };

// Of each request asked from here: its token ids so far, and how many of them are its prompt.
const asked = new Map();
const words = new Map();
let shown = { id: null, report: null };
let model;

async function call(url, options = {}) {
  const headers = { "Content-Type": "application/json", ...options.headers };
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const answer = await fetch(url, { ...options, headers });
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.error?.message ?? body.detail ?? `the server says ${answer.status}`);
  }
  return answer;
}

function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
}

async function ask(prompt, memory, output) {
  const chat = at("chat").checked;
  const id = newId();
  const name = `${chat ? "chatcmpl" : "cmpl"}-${id}`;
  const request = { ids: [], prompt: 0, running: true };
  const body = {
    model, stream: true, return_token_ids: true, temperature: 0, max_tokens: Number(at("tokens").value),
    vllm_xargs: memory ? { pacellm_report: true } : { pacellm_enabled: false },
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  output.textContent = "";
  if (memory) {
    asked.set(name, request);
    at("requests").append(new Option(name, name));
    at("request").value = name;
    watch(name);
  }
  try {
    const answer = await call(`${SERVER}v1/${chat ? "chat/completions" : "completions"}`, {
      method: "POST", body: JSON.stringify(body), headers: { "X-Request-Id": id },
    });
    let text = "";
    let rest = "";
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: {")) continue;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) throw new Error(chunk.error.message);
        const choice = chunk.choices[0];
        const ids = chunk.prompt_token_ids ?? choice?.prompt_token_ids;
        if (ids && !request.prompt) {
          request.ids.unshift(...ids);
          request.prompt = ids.length;
        }
        request.ids.push(...(choice?.token_ids ?? []));
        text += choice?.text ?? choice?.delta?.content ?? "";
      }
      output.textContent = text;
    }
  } catch (error) {
    output.textContent = `${error.message}`;
  } finally {
    request.running = false;
  }
}

async function watch(id) {
  shown = { id, report: null };
  draw();
  for (let running = true; running && shown.id === id; ) {
    running = asked.get(id)?.running ?? false;
    try {
      await look(id);
    } catch (error) {
      if (!running && shown.id === id) at("status").textContent = error.message;
    }
    if (running) await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

async function look(id) {
  const request = asked.get(id);
  const first = request?.prompt ?? 0;
  const asks = new URLSearchParams({ first, empty: request?.running ?? false, experts: at("experts").value || -1 });
  const answer = await call(`${PLUGIN}answers/${encodeURIComponent(id)}?${asks}`);
  const report = await answer.json();
  const missing = [...new Set(request?.ids ?? [])].filter((token) => !words.has(token));
  if (missing.length) {
    const spelled = await call(`${PLUGIN}words`, { method: "POST", body: JSON.stringify({ ids: missing }) });
    (await spelled.json()).words.forEach((word, i) => words.set(missing[i], word));
  }
  if (shown.id !== id) return;
  shown.report = report;
  draw();
}

function word(position) {
  const token = asked.get(shown.id)?.ids[position];
  return token === undefined ? "\u00b7" : (words.get(token) ?? "\u00b7");
}

function where(position) {
  return position < 0 ? "a token read by another request" : `${JSON.stringify(word(position))} at ${position}`;
}

function draw() {
  const layers = shown.report?.layers ?? {};
  const select = at("layer");
  if (Object.keys(layers).join() !== [...select.options].map((option) => option.value).join()) {
    select.replaceChildren(...Object.keys(layers).map((layer) => new Option(layer, layer)));
  }
  const layer = layers[select.value];
  drawText(layer);
  drawRates(layer);
  drawBank(layer);
  drawExperts();
  at("recalls").replaceChildren(...(layer?.strongest ?? []).map((recall) => {
    const item = document.createElement("li");
    item.textContent = `${where(recall.position)} recalled ${where(recall.source)} through slot ${recall.slot} (${recall.similarity.toFixed(2)})`;
    return item;
  }));
  const counts = layer && Object.entries(layer.tokens).filter(([, count]) => count);
  at("status").textContent = layer
    ? `${layer.kinds.length} tokens (${counts.map(([kind, count]) => `${count} ${kind}`).join(", ")}), ${layer.commits.length} commits, ${layer.slots.length} slots in use`
    : "";
}

function drawText(layer) {
  const kinds = layer?.kinds ?? "";
  const text = at("text");
  // Tokens that are there stay: of a long text only what is new is made.
  if (text.dataset.of !== `${shown.id} ${at("layer").value}` || text.children.length > kinds.length) {
    text.replaceChildren();
    text.dataset.of = `${shown.id} ${at("layer").value}`;
  }
  for (let i = 0; i < text.children.length; i++) {
    const token = text.children[i];
    if (token.dataset.kind !== kinds[i]) token.dataset.kind = kinds[i];
    if (token.dataset.bare && word(i) !== "\u00b7") name(token, i);
  }
  const fresh = document.createDocumentFragment();
  for (let i = text.children.length; i < kinds.length; i++) {
    const token = document.createElement("span");
    token.dataset.kind = kinds[i];
    token.dataset.at = i;
    name(token, i);
    fresh.append(token);
  }
  text.append(fresh);
}

function name(token, position) {
  token.textContent = word(position);
  if (token.textContent === "\u00b7") token.dataset.bare = 1;
  else delete token.dataset.bare;
}

function drawRates(layer) {
  const bars = [];
  const ends = (layer?.commits ?? []).map((commit) => commit.position);
  if (layer && layer.kinds.length > (ends.at(-1) ?? 0)) ends.push(layer.kinds.length);
  let from = 0;
  ends.forEach((end, i) => {
    const tokens = layer.kinds.slice(from, end);
    from = end;
    let top = 0;
    for (const kind of ["h", "m", "l", "e"]) {
      const share = [...tokens].filter((letter) => letter === kind).length / tokens.length;
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const box = { x: (600 * i) / ends.length, y: 120 * top, width: 600 / ends.length - 1, height: 120 * share };
      for (const [key, value] of Object.entries(box)) bar.setAttribute(key, Math.max(value, 0));
      bar.setAttribute("class", kind);
      top += share;
      bars.push(bar);
    }
  });
  at("rates").replaceChildren(...bars);
}

function drawBank(layer) {
  const slots = (layer?.slots ?? []).map((slot, index) => ({ ...slot, index }));
  slots.sort((one, other) => other.usage - one.usage || one.index - other.index);
  const most = Math.max(1, ...slots.map((slot) => slot.usage));
  at("bank").tBodies[0].replaceChildren(...slots.map((slot) => {
    const row = document.createElement("tr");
    const meter = document.createElement("meter");
    Object.assign(meter, { max: most, value: slot.usage });
    meter.setAttribute("aria-label", `slot ${slot.index} was used ${slot.usage} times`);
    row.insertCell().textContent = slot.index;
    row.insertCell().append(meter, ` ${slot.usage}`);
    row.insertCell().textContent = slot.merges;
    row.insertCell().textContent = where(slot.source);
    row.insertCell().textContent = slot.nearest < 0 ? "" : `slot ${slot.nearest} (${slot.likeness.toFixed(2)})`;
    return row;
  }));
}

function drawExperts() {
  const routed = shown.report?.experts ?? { layers: [] };
  at("routing").hidden = !routed.layers.length;
  const layers = ["", ...routed.layers.map(String)];
  const select = at("experts");
  if (layers.join() !== [...select.options].map((option) => option.value).join()) {
    const chosen = select.value;
    select.replaceChildren(...layers.map((layer) => new Option(layer || "not shown", layer)));
    if (layers.includes(chosen)) select.value = chosen;
  }
  const count = select.value ? (routed.num_experts ?? 0) : 0;
  const marked = at("expert");
  if (marked.options.length !== count + 1) {
    marked.replaceChildren(new Option("none", ""), ...Array.from({ length: count }, (_, i) => new Option(i, i)));
  }
  marked.disabled = !count;
  const firsts = Array.from({ length: count }, () => []);
  const tokens = at("text").children;
  for (let i = 0; i < tokens.length; i++) {
    const mine = count ? expertsAt(i) : [];
    tokens[i].classList.toggle("computed", marked.value !== "" && mine.includes(Number(marked.value)));
    for (const expert of mine) {
      const some = firsts[expert];
      if (some.length < 8 && !some.includes(word(i))) some.push(word(i));
    }
  }
  at("shares").hidden = !count;
  const order = firsts.map((_, expert) => expert).sort((a, b) => routed.tokens[b] - routed.tokens[a] || a - b);
  at("shares").tBodies[0].replaceChildren(...order.map((expert) => {
    const row = document.createElement("tr");
    const meter = document.createElement("meter");
    Object.assign(meter, { max: Math.max(...routed.tokens), value: routed.tokens[expert] });
    meter.setAttribute("aria-label", `expert ${expert} was computed for ${routed.tokens[expert]} tokens`);
    row.insertCell().textContent = expert;
    row.insertCell().append(meter, ` ${routed.tokens[expert]}`);
    row.insertCell().textContent = firsts[expert].map((said) => JSON.stringify(said)).join(" ");
    return row;
  }));
}

// The experts that the token at a position computed; none where that was not read.
function expertsAt(position) {
  const { chosen, num_experts: count } = shown.report?.experts ?? {};
  if (!chosen) return [];
  const digits = 2 * Math.ceil(count / 8);
  const mine = chosen.slice(position * digits, (position + 1) * digits);
  const found = [];
  for (let i = 0; i < mine.length; i++) {
    const four = parseInt(mine[i], 16);
    for (let bit = 0; bit < 4; bit++) if (four & (8 >> bit)) found.push(4 * i + bit);
  }
  return found;
}

at("text").addEventListener("click", (event) => {
  const position = Number(event.target.dataset.at ?? NaN);
  const layer = shown.report?.layers[at("layer").value];
  if (!layer || Number.isNaN(position)) return;
  document.querySelectorAll("#text .spoke").forEach((token) => token.classList.remove("spoke"));
  const source = layer.source[position];
  at("text").children[source]?.classList.add("spoke");
  const found = "hml".includes(layer.kinds[position])
    ? `; most like slot ${layer.slot[position]}, taken by ${where(source)} (mean similarity ${layer.similarity[position]})`
    : "";
  const experts = at("experts").value ? expertsAt(position) : [];
  const routed = experts.length ? `; experts ${experts.join(", ")} of layer ${at("experts").value}` : "";
  at("token").textContent = `${where(position)}: ${NAMES[layer.kinds[position]]}${found}${routed}.`;
});

at("layer").addEventListener("change", draw);
at("expert").addEventListener("change", draw);
at("experts").addEventListener("change", async () => {
  at("expert").value = "";
  if (shown.id && at("experts").value) await look(shown.id).catch((error) => { at("status").textContent = error.message; });
  draw();
});
at("look").addEventListener("submit", (event) => {
  event.preventDefault();
  watch(at("request").value.trim());
});
at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("send").disabled = true;
  try {
    model ??= (await (await call(`${SERVER}v1/models`)).json()).data[0].id;
    const prompt = at("prompt").value;
    await Promise.all([ask(prompt, true, at("with")), ask(prompt, false, at("without"))]);
  } catch (error) {
    at("with").textContent = error.message;
  } finally {
    at("send").disabled = false;
  }
});
