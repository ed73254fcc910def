// A conversation with the model of this server, through its own /v1/chat/completions. What the model writes is only ever
// put into text nodes.
"use strict";

const WORDS = {
  en: {
    greeting: "What is on your mind?",
    introduction: "What you write is answered by the model on this server, and kept in this page alone.",
    untrained: "This model was not trained for conversations: it goes on with what it reads as with any text.",
    conversation: "Conversation",
    message: "Message",
    placeholder: "Write a message",
    send: "Send",
    stop: "Stop the answer",
    reset: "New conversation",
    settings: "Settings",
    keys: "Enter sends · Shift+Enter begins a line · Escape stops",
    temperature: "Temperature",
    temperatureHelp: "At 0 the likeliest words are taken; higher is more varied.",
    maxTokens: "Longest answer, in tokens",
    system: "System prompt",
    systemPlaceholder: "What the model is told before all else",
    key: "API key",
    keyHelp: "Only if the server asks for one. It is forgotten when this tab is closed.",
    close: "Done",
    you: "You",
    assistant: "Model",
    tokens: (count, rate) => `${count} tokens · ${rate} a second`,
    stopped: "stopped",
    cut: "cut off at the limit",
    forgotten: "the model no longer reads the oldest turns",
    interrupted: "The connection broke before the answer was complete.",
  },
  zh: {
    greeting: "想聊点什么？",
    introduction: "您写下的内容由本服务器上的模型回答，对话只保存在这个页面里。",
    untrained: "这个模型没有经过对话训练：它只是像续写普通文本那样接着写下去。",
    conversation: "对话",
    message: "消息",
    placeholder: "输入消息",
    send: "发送",
    stop: "停止回答",
    reset: "新对话",
    settings: "设置",
    keys: "Enter 发送 · Shift+Enter 换行 · Esc 停止",
    temperature: "温度",
    temperatureHelp: "为 0 时总取最可能的词；越高越多样。",
    maxTokens: "回答的最大长度（token）",
    system: "系统提示",
    systemPlaceholder: "在一切之前告诉模型的话",
    key: "API 密钥",
    keyHelp: "仅在服务器要求时填写。关闭此标签页后即被忘记。",
    close: "完成",
    you: "您",
    assistant: "模型",
    tokens: (count, rate) => `${count} 个 token · 每秒 ${rate} 个`,
    stopped: "已停止",
    cut: "已达到最大长度",
    forgotten: "模型不再读取最早的几轮对话",
    interrupted: "回答完成之前连接中断了。",
  },
};

/** Tokens of an answer where nothing else is asked for, if the context has room. */
const ANSWER_TOKENS = 512;
/** How near its end, in pixels, a conversation is to be kept there while it grows. */
const NEAR_END = 80;

const [scroller, turns, text, notice, settings] = ["scroller", "turns", "text", "notice", "settings"].map(element);

/** What was said: `{role, content}`. */
let messages = [];
/** Where in it the part begins that the model still has room for. */
let first = 0;
/** Stops the answer under way, if there is one. */
let controller = null;

// The server.

function key() {
  return element("key").value.trim();
}

/** The events of a stream, parsed, until it says that it is done. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error(say("interrupted"));
    pending += value;
    const lines = pending.split("\n");
    pending = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data: "))) {
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** The stream of an answer. Turns that the context has no room for are left out, the oldest first. */
async function open(signal) {
  for (;;) {
    const system = element("system").value.trim();
    const said = messages.slice(first).map(({ role, content }) => ({ role, content }));
    const body = {
      messages: system ? [{ role: "system", content: system }, ...said] : said,
      temperature: Number(element("temperature").value),
      stream: true,
      stream_options: { include_usage: true },
    };
    const longest = Number(element("max-tokens").value);
    if (longest > 0) body.max_completion_tokens = longest;
    try {
      return await ask("v1/chat/completions", key(), { method: "POST", body: JSON.stringify(body), signal });
    } catch (error) {
      if (error.code !== "context_length_exceeded" || first + 2 >= messages.length) throw error;
      first += 2;
    }
  }
}

/** Learns which model there is. */
async function meet() {
  try {
    const { data } = await (await ask("v1/models", key())).json();
    const [model] = data;
    element("model").textContent = document.title = model.id;
    element("untrained").hidden = model.trained_for_conversations;
    if (!element("max-tokens").value) {
      element("max-tokens").value = Math.max(1, Math.min(ANSWER_TOKENS, Math.floor(model.context_length / 2)));
    }
    complain(null);
  } catch (error) {
    refused(error);
  }
}

// The conversation.

/** Shows a turn, and returns its parts. */
function show(role, content) {
  element("welcome").hidden = true;
  const turn = document.createElement("li");
  turn.className = `turn ${role}`;
  const who = document.createElement("span");
  who.className = "unseen";
  who.textContent = `${say(role === "user" ? "you" : "assistant")}: `;
  const words = document.createElement("div");
  words.className = "text";
  const node = document.createTextNode(content);
  words.append(node);
  const about = document.createElement("p");
  about.className = "about";
  turn.append(who, words, about);
  turns.append(turn);
  scroller.scrollTop = scroller.scrollHeight;
  return { turn, node, about };
}

function complain(message) {
  notice.hidden = !message;
  notice.textContent = message ?? "";
}

function refused(error) {
  complain(error.message);
  if (error.status === 401 && !settings.open) {
    settings.showModal();
    element("key").focus();
  }
}

/** Sends what was written, and shows the answer as it comes. */
async function send() {
  const content = text.value.trim();
  if (!content || controller) return;
  complain(null);
  text.value = "";
  fit();
  messages.push({ role: "user", content });
  const question = show("user", content);
  const { turn, node, about } = show("assistant", "");
  turn.dataset.state = "streaming";
  turn.setAttribute("aria-busy", "true");
  const mine = (controller = new AbortController());
  busy();
  const notes = [];
  let state = "done";
  try {
    const before = first;
    const stream = events(await open(mine.signal));
    if (first > before) notes.push(say("forgotten"));
    let began = null;
    for await (const event of stream) {
      const [choice] = event.choices;
      if (choice?.delta.content) {
        began ??= performance.now();
        const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
        node.appendData(choice.delta.content);
        if (atEnd) scroller.scrollTop = scroller.scrollHeight;
      }
      if (choice?.finish_reason === "length") notes.push(say("cut"));
      if (event.usage && began !== null) {
        const count = event.usage.completion_tokens;
        const rate = Math.round((count * 1000) / Math.max(performance.now() - began, 1));
        notes.unshift(say("tokens")(count, rate));
      }
    }
  } catch (error) {
    state = error.name === "AbortError" ? "stopped" : "failed";
    if (state === "stopped") notes.push(say("stopped"));
    else if (controller === mine) refused(error);
  }
  turn.dataset.state = state;
  turn.removeAttribute("aria-busy");
  about.textContent = notes.join(" · ");
  if (controller !== mine) return; // A new conversation has begun meanwhile.
  controller = null;
  busy();
  if (state === "failed" && !node.data) {
    // It was not heard: it may be sent again.
    messages.pop();
    turn.remove();
    question.turn.remove();
    if (!text.value) text.value = content;
    fit();
  } else {
    messages.push({ role: "assistant", content: node.data.trimEnd() });
  }
}

function stop() {
  controller?.abort();
}

function reset() {
  stop();
  controller = null;
  messages = [];
  first = 0;
  turns.replaceChildren();
  element("welcome").hidden = false;
  complain(null);
  busy();
  text.focus();
}

/** Shows what can be done now. */
function busy() {
  element("send").hidden = controller !== null;
  element("stop").hidden = controller === null;
  element("send").disabled = !text.value.trim();
}

/** As many lines as are written. */
function fit() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  busy();
}

// What people do.

element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
text.addEventListener("input", fit);
text.addEventListener("keydown", (event) => {
  // Enter that chooses a word of an input method is none.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !settings.open && !event.isComposing) stop();
});
element("stop").addEventListener("click", () => {
  stop();
  text.focus();
});
element("reset").addEventListener("click", reset);
element("open-settings").addEventListener("click", () => settings.showModal());
settings.addEventListener("close", meet);
for (const [id, otherwise] of [["temperature", "0.8"], ["max-tokens", ""], ["system", ""], ["key", ""]]) {
  const input = element(id);
  input.value = stored(id, otherwise);
  input.addEventListener("input", () => store(id, input.value));
}
const showTemperature = () => (element("temperature-shown").value = element("temperature").value);
element("temperature").addEventListener("input", showTemperature);

translate();
showTemperature();
fit();
meet();
