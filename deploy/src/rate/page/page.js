// Two answers, of which a person says which is better. What the model writes is only ever put into text nodes.
"use strict";

const WORDS = {
  en: {
    progress: "Judged so far",
    count: (judged, total) => (total === null ? `${judged} judged` : `${judged} of ${total} judged`),
    alike: (count) => `${count} left out, as all answers were alike`,
    wait: "The model is answering…",
    finished: "All is judged. Thank you!",
    finishedHelp: "What you judged is kept. The last judgement can still be taken back.",
    ask: "Ask the model something. You will see two answers.",
    question: "Which answer is better?",
    prompt: "What was asked",
    firstAnswer: "First answer",
    secondAnswer: "Second answer",
    empty: "The model said nothing.",
    cut: "Cut off: the answer was not complete.",
    which: "Which answer is better?",
    first: "First is better",
    second: "Second is better",
    tie: "Equally good",
    bothBad: "Both bad",
    undo: "Take back",
    keys: "1 or ← · 2 or → · 0 or T equally good · B both bad · U takes back",
    kept: { first: "Kept: first is better", second: "Kept: second is better", tie: "Kept: equally good", both_bad: "Kept: both bad" },
    undone: "Taken back",
    message: "What the model is asked",
    placeholder: "Ask the model something",
    send: "Ask",
    again: "Try again",
    roles: { user: "User: ", assistant: "Model: ", system: "System: " },
    codes: {
      invalid_api_key: "This link is not valid. Please ask for a link of your own.",
      judged_otherwise: "This pair was judged otherwise before, perhaps in another tab. Take that back first.",
      taken_back: "This judgement was taken back, perhaps in another tab. Here is the pair as it is now.",
      unknown_pair: "This pair is not here any more. Here is the next one.",
      unknown_judgement: "There is no such judgement any more.",
      not_last: "There are later judgements, perhaps from another tab. Take back the last one first.",
      pair_waits: "A pair of answers is to be judged first.",
      alike: "The model gave the same answer again and again. Please ask something else.",
      server_stopping: "The server is stopping. What you judged is kept.",
    },
  },
  zh: {
    progress: "已评判",
    count: (judged, total) => (total === null ? `已评判 ${judged} 组` : `已评判 ${judged} / ${total} 组`),
    alike: (count) => `${count} 组因回答全部相同而跳过`,
    wait: "模型正在回答……",
    finished: "全部评判完毕，谢谢！",
    finishedHelp: "您的评判已保存，最后一次评判仍可撤回。",
    ask: "向模型提一个问题，您会看到两个回答。",
    question: "哪个回答更好？",
    prompt: "所提的问题",
    firstAnswer: "第一个回答",
    secondAnswer: "第二个回答",
    empty: "模型什么也没有说。",
    cut: "被截断：回答不完整。",
    which: "哪个回答更好？",
    first: "第一个更好",
    second: "第二个更好",
    tie: "一样好",
    bothBad: "都不好",
    undo: "撤回",
    keys: "1 或 ← · 2 或 → · 0 或 T 一样好 · B 都不好 · U 撤回",
    kept: { first: "已保存：第一个更好", second: "已保存：第二个更好", tie: "已保存：一样好", both_bad: "已保存：都不好" },
    undone: "已撤回",
    message: "要问模型的内容",
    placeholder: "向模型提问",
    send: "提问",
    again: "重试",
    roles: { user: "用户：", assistant: "模型：", system: "系统：" },
    codes: {
      invalid_api_key: "此链接无效，请索取您自己的链接。",
      judged_otherwise: "这一组之前有过不同的评判，可能是在另一个标签页里。请先撤回。",
      taken_back: "这次评判已被撤回，可能是在另一个标签页里。以下是现在的这一组。",
      unknown_pair: "这一组已经不在了，以下是下一组。",
      unknown_judgement: "这次评判已经不在了。",
      not_last: "之后还有别的评判，可能来自另一个标签页。请先撤回最后一次。",
      pair_waits: "请先评判已有的一组回答。",
      alike: "模型一再给出相同的回答，请换一个问题。",
      server_stopping: "服务器正在停止，您的评判已保存。",
    },
  },
};

/** What a key means, by its name, and by its place where an input method keeps the name to itself. */
const KEYS = { 1: "first", arrowleft: "first", 2: "second", arrowright: "second", 0: "tie", t: "tie", b: "both_bad", u: "undo" };

const [scroller, pairShown, notice, text] = ["scroller", "pair", "notice", "text"].map(element);
const buttons = [...document.querySelectorAll("[data-choice]")];
/** Whose page it is: the token of the link. */
const token = new URLSearchParams(location.search).get("token");

/** What the server said last. */
let state = null;
/** Whether something is under way to the server. */
let busy = false;
/** What was done last: `undo`, or a choice. */
let done = null;
/** What went wrong, as the server said it. */
let trouble = null;

// The server.

function request(path, body) {
  return ask(path, token, body && { method: "POST", body: JSON.stringify(body) }).then((response) => response.json());
}

/** The state, once there is a pair to judge or nothing more to wait for, or after a while. */
async function next() {
  try {
    return await request("api/state");
  } catch (error) {
    if (error.code !== "alike") throw error;
    trouble = error;
    return request("api/state");
  }
}

/** Does something, if it is said what, and shows what comes of it, until there is a pair or nothing more to wait for. */
async function act(path, body) {
  if (busy) return;
  [busy, trouble] = [true, null];
  render();
  // After a refusal the state is asked for: another tab may have gone on meanwhile.
  let isCurrent = false;
  try {
    if (path) {
      state = await request(path, body);
      isCurrent = true;
      done = { "api/judgements": body.choice, "api/undo": "undo" }[path] ?? null;
    }
  } catch (error) {
    trouble = error;
  }
  try {
    while (!isCurrent || state.waiting) {
      render();
      state = await next();
      isCurrent = true;
    }
  } catch (error) {
    trouble ??= error;
  }
  busy = false;
  render();
}

function judge(choice) {
  if (state?.pair && !busy) act("api/judgements", { id: state.pair.id, choice });
}

function undo() {
  if (state?.last && !busy) act("api/undo", { id: state.last.id });
}

function write() {
  const prompt = text.value.trim();
  if (prompt && !busy) act("api/prompts", { prompt });
}

// What is shown.

/** The pair that is shown. */
let shownId = null;

function render() {
  const { pair, typed, last, judged, total, alike, waiting } = state ?? {};
  if (state) {
    element("model").textContent = document.title = state.model;
    element("rater").textContent = state.rater;
    const count = [say("count")(judged, total), ...(alike ? [say("alike")(alike)] : [])];
    element("count").textContent = count.join(" · ");
    element("bar").hidden = total === null;
    Object.assign(element("bar"), { max: Math.max(total ?? 1, 1), value: judged });
  }
  pairShown.hidden = !pair;
  pairShown.setAttribute("aria-busy", String(busy));
  element("wait").hidden = Boolean(pair) || !(waiting || (busy && !state));
  element("finished").hidden = !state || Boolean(pair) || waiting || typed;
  element("composer").hidden = !typed || Boolean(pair) || waiting;
  element("invitation").hidden = element("composer").hidden;
  element("choices").hidden = !pair && !busy;
  element("send").disabled = busy || !text.value.trim();
  for (const button of buttons) button.disabled = busy || !pair;
  element("undo").disabled = busy || !last;
  element("said").textContent = done === null || busy || trouble ? "" : done === "undo" ? say("undone") : say("kept")[done];
  notice.hidden = trouble === null;
  element("problem").textContent = trouble === null ? "" : (say("codes")[trouble.code] ?? trouble.message);
  show(pair ?? null);
}

/** Shows a pair, or none. */
function show(pair) {
  for (const [place, article] of [...document.querySelectorAll(".answer")].entries()) {
    const answer = pair?.answers[place] ?? "";
    article.querySelector(".text").textContent = answer;
    const notes = [];
    if (pair && !answer) notes.push(say("empty"));
    if (pair?.finish[place] === "length") notes.push(say("cut"));
    article.querySelector(".about").textContent = notes.join(" ");
  }
  element("prompt").replaceChildren(...(pair?.prompt ?? []).map(turn));
  const isNew = shownId !== (pair?.id ?? null);
  shownId = pair?.id ?? null;
  if (pair && isNew) {
    scroller.scrollTop = 0;
    // What reads the page aloud begins here.
    pairShown.focus({ preventScroll: true });
  } else if (!pair && !element("composer").hidden && document.activeElement !== text) {
    fit();
    text.focus();
    text.select();
  }
}

function turn({ role, content }) {
  const item = document.createElement("li");
  item.className = "turn";
  if (["user", "assistant", "system"].includes(role)) item.classList.add(role);
  item.dir = "auto";
  const who = document.createElement("span");
  who.className = "unseen";
  who.textContent = say("roles")[role] ?? `${role}: `;
  item.append(who, content);
  return item;
}

/** As many lines as are written. */
function fit() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  element("send").disabled = busy || !text.value.trim();
}

// What people do.

for (const button of buttons) {
  button.addEventListener("click", (event) => {
    // The second click of two would judge what nobody has read.
    if (event.detail < 2) judge(button.dataset.choice);
  });
}
element("undo").addEventListener("click", (event) => {
  if (event.detail < 2) undo();
});
element("again").addEventListener("click", () => act());
element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
text.addEventListener("input", fit);
text.addEventListener("keydown", (event) => {
  // Enter that chooses a word of an input method is none.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    write();
  }
});
document.addEventListener("keydown", (event) => {
  // What is written is not meant for the buttons, and a key that is held down is pressed once.
  if (event.target instanceof HTMLTextAreaElement || event.isComposing || event.repeat) return;
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const name = event.key === "Process" ? event.code.replace(/^(Digit|Key|Numpad)/, "") : event.key;
  const meant = KEYS[name.toLowerCase()];
  if (!meant) return;
  event.preventDefault();
  if (meant === "undo") undo();
  else judge(meant);
});
// Texts of the page itself are in the new language by then.
element("language").addEventListener("click", render);

translate();
fit();
act();
