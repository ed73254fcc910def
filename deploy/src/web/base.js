// What all pages have in common: two languages, what a tab remembers, and requests to the server. A page's own script comes
// after this one, and has its words in WORDS, by language.
"use strict";

const LANGUAGES = {
  en: { lang: "en", name: "English", unreachable: "The server cannot be reached." },
  zh: { lang: "zh-CN", name: "中文", unreachable: "无法连接到服务器。" },
};

const element = (id) => document.getElementById(id);

let language = stored("language", navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

// Kept for as long as the tab is open.

function stored(name, otherwise) {
  return sessionStorage.getItem(`lockstep.${name}`) ?? otherwise;
}

function store(name, value) {
  sessionStorage.setItem(`lockstep.${name}`, value);
}

/** A word, or what makes one, in the present language. */
function say(name) {
  return WORDS[language][name] ?? LANGUAGES[language][name];
}

/** Puts the page into the present language. */
function translate() {
  document.documentElement.lang = say("lang");
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = say(node.dataset.text);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = say(node.dataset.placeholder);
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", say(node.dataset.label));
    if (node instanceof HTMLButtonElement) node.title = say(node.dataset.label);
  }
  const { name, lang } = LANGUAGES[otherLanguage()];
  Object.assign(element("language"), { textContent: name, lang });
}

function otherLanguage() {
  return language === "en" ? "zh" : "en";
}

element("language").addEventListener("click", () => {
  language = otherLanguage();
  store("language", language);
  translate();
});

/** Asks the server, with a secret if there is one; a refusal is an `Error` with its words, its `status` and its `code`. */
async function ask(path, secret, options = {}) {
  const headers = { "content-type": "application/json", ...(secret && { authorization: `Bearer ${secret}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(say("unreachable"));
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({ error: { message: `HTTP ${response.status}` } }));
  throw Object.assign(new Error(error.message), { status: response.status, code: error.code });
}
