//! A model served over HTTP, and talked with: real processes and sockets, OpenAI's own client, a real browser.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::cluster::{fail, lockstep, path, python, succeed, text, workspace};
use crate::server::{Server, answer, chromium, send, tiny_model};

const KEY: &str = "sesame";
/// What the model of these tests reads at most, tokens.
const CONTEXT: usize = 2048;

/// What these tests want of a server.
impl Server {
    fn start(run: &Path, more: &[&str]) -> Self {
        let arguments = ["serve", "--run", path(run), "--listen", "127.0.0.1:0", "--device", "cpu"];
        let mut command = lockstep(&[&arguments, more].concat(), &[]);
        // What it says of each request would fill a pipe that nobody reads.
        command.env_remove("LOCKSTEP_API_KEY").env("RUST_LOG", "warn");
        Self::of(command)
    }

    /// The events of a stream, and whether it said that it was done.
    fn stream(&self, path: &str, body: &Value) -> (Vec<Value>, bool) {
        events(BufReader::new(self.open(path, body).into_body().into_reader()))
    }

    /// A connection on which a chat was announced, and its body not sent yet.
    fn begin(&self, length: usize) -> TcpStream {
        let mut stream = TcpStream::connect(self.url.trim_start_matches("http://")).unwrap();
        let head = "host: localhost\r\ncontent-type: application/json\r\ncontent-length:";
        write!(stream, "POST {CHAT} HTTP/1.1\r\n{head} {length}\r\n\r\n").unwrap();
        stream
    }

    fn load(&self) -> (u64, u64) {
        let (_, health) = self.get("/healthz");
        (health["running"].as_u64().unwrap(), health["queued"].as_u64().unwrap())
    }

    /// Asks until as many sequences run and wait.
    fn wait_for_load(&self, load: (u64, u64)) {
        while self.load() != load {}
    }
}

fn events(reader: impl std::io::BufRead) -> (Vec<Value>, bool) {
    let mut events = Vec::new();
    for line in reader.lines() {
        match line.unwrap().strip_prefix("data: ") {
            Some("[DONE]") => return (events, true),
            Some(data) => events.push(serde_json::from_str(data).expect("events are JSON")),
            None => {}
        }
    }
    (events, false)
}

fn chat(content: &str, more: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": content }], "max_tokens": 40, "seed": 5 });
    let Value::Object(more) = more else { panic!("fields") };
    body.as_object_mut().unwrap().extend(more);
    body
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[test]
fn answers_come_whole_or_as_a_stream_and_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&tiny_model(dir.path()), &[]);
    let (status, whole) = server.post(CHAT, &chat("Who is there?", json!({ "n": 2 })));
    assert_eq!(status, 200, "{whole}");
    let contents: Vec<&str> = whole["choices"].as_array().unwrap().iter().map(content).collect();
    assert!(contents.len() == 2 && contents[0] != contents[1] && !contents[0].is_empty(), "{contents:?}");
    assert_eq!(whole["usage"]["completion_tokens"], 80);

    let more = json!({ "n": 2, "stream": true, "stream_options": { "include_usage": true } });
    let (events, done) = server.stream(CHAT, &chat("Who is there?", more));
    assert!(done);
    let mut streamed = [String::new(), String::new()];
    let mut finished = [None, None];
    for choice in events.iter().filter_map(|event| event["choices"].get(0)) {
        let index = choice["index"].as_u64().unwrap() as usize;
        streamed[index].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        finished[index] = choice["finish_reason"].as_str().or(finished[index]);
    }
    assert_eq!(streamed.each_ref().map(String::as_str), contents[..]);
    assert_eq!(finished, [Some("length"); 2]);
    assert_eq!(events.last().unwrap()["usage"], whole["usage"]);
    assert!(events[..events.len() - 1].iter().all(|event| event["usage"].is_null()));

    // An answer ends before a stop string, wherever it comes.
    let middle: String = contents[0].chars().skip(10).take(3).collect();
    let (before, _) = contents[0].split_once(&middle).unwrap();
    let (_, stopped) = server.post(CHAT, &chat("Who is there?", json!({ "stop": [middle, "never, never"] })));
    assert_eq!((content(&stopped["choices"][0]), &stopped["choices"][0]["finish_reason"]), (before, &json!("stop")));

    // Texts and their tokens are continued alike, with and without what they began with.
    let completion = |prompt: Value, echo: bool| {
        let body = json!({ "prompt": prompt, "max_tokens": 9, "seed": 1, "echo": echo });
        let (status, body) = server.post(COMPLETIONS, &body);
        assert_eq!(status, 200, "{body}");
        body["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap().to_string()).collect()
    };
    let continued: Vec<String> = completion(json!("In the"), false);
    assert_eq!(continued, completion(json!("In the".bytes().collect::<Vec<u8>>()), false));
    let both: Vec<String> = completion(json!(["In the", "And"]), true);
    assert_eq!(both[0], format!("In the{}", continued[0]));
    assert!(both[1].starts_with("And"));
}

fn content(choice: &Value) -> &str {
    choice["message"]["content"].as_str().unwrap()
}

#[test]
fn what_cannot_be_served_is_refused_in_openais_form() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&tiny_model(dir.path()), &["--max-tokens", "500"]);
    let long = "x".repeat(CONTEXT - 100);
    let refusals = [
        (CHAT, json!({}), 400, "messages", Value::Null),
        (CHAT, chat("", json!({ "temperature": 3 })), 400, "temperature", Value::Null),
        (CHAT, chat("", json!({ "tools": [{}] })), 400, "tools", json!("unsupported_parameter")),
        (CHAT, chat("", json!({ "max_tokens": 501 })), 400, "max_tokens", Value::Null),
        (CHAT, chat("", json!({ "model": "gpt-4" })), 404, "model", json!("model_not_found")),
        (CHAT, chat("", json!({ "n": 100 })), 400, "n", Value::Null),
        (CHAT, chat(&long, json!({ "max_tokens": 200 })), 400, "messages", json!("context_length_exceeded")),
        (COMPLETIONS, json!({ "prompt": long, "max_tokens": 200 }), 400, "prompt", json!("context_length_exceeded")),
        (COMPLETIONS, json!({ "prompt": "" }), 400, "prompt", Value::Null),
        (COMPLETIONS, json!({ "prompt": [256] }), 400, "prompt", Value::Null),
        (COMPLETIONS, json!({ "prompt": "a", "suffix": "b" }), 400, "suffix", json!("unsupported_parameter")),
    ];
    for (path, body, status, param, code) in refusals {
        let (found, error) = server.post(path, &body);
        let error = &error["error"];
        assert_eq!((found, &error["param"], &error["code"]), (status, &json!(param), &code), "{path} {param}: {error}");
        assert!(error["message"].as_str().is_some_and(|said| !said.is_empty()) && error["type"].is_string(), "{error}");
    }
    // One with room for a part of what may be asked for gets as much.
    let (status, cut) = server.post(CHAT, &chat(&"x".repeat(CONTEXT - 100), json!({ "max_tokens": null })));
    assert_eq!((status, &cut["usage"]["total_tokens"]), (200, &json!(CONTEXT)), "{cut}");

    let status = |method: &str, path: &str, content_type: &str, body: Option<String>| {
        let (status, body) = answer(send(server.request(method, path).header("content-type", content_type), body));
        assert!(body["error"]["message"].is_string(), "{body}");
        status
    };
    let json = "application/json";
    assert_eq!(status("POST", CHAT, json, Some("{".into())), 400);
    assert_eq!(status("POST", CHAT, "text/plain", Some("{}".into())), 415);
    // What is too large is said before it is sent.
    let mut large = server.begin(5 << 20);
    let mut line = String::new();
    BufReader::new(&mut large).read_line(&mut line).unwrap();
    assert_eq!(line, "HTTP/1.1 413 Payload Too Large\r\n");
    assert_eq!(status("POST", "/v1/embeddings", json, Some("{}".into())), 404);
    assert_eq!(status("GET", "/v1/models/another", json, None), 404);
    assert_eq!(status("DELETE", "/v1/models", json, None), 405);
    assert_eq!(answer(send(server.request("GET", "/v1/models").header("host", "evil.example"), None)).0, 403);
    assert_eq!(server.get("/v1/models").1["data"][0]["id"], "tiny");
    assert_eq!(server.load(), (0, 0));
}

#[test]
fn whoever_has_no_key_is_turned_away() {
    let dir = tempfile::tempdir().unwrap();
    let run = tiny_model(dir.path());
    let key = dir.path().join("key");
    fs::write(&key, format!("{KEY}\n")).unwrap();
    let mut server = Server::start(&run, &["--api-key-file", path(&key)]);
    assert_eq!(server.get("/healthz").0, 200);
    for wrong in [None, Some("sesam"), Some("")] {
        server.key = wrong;
        let (status, error) = server.get("/v1/models");
        assert_eq!((status, &error["error"]["code"]), (401, &json!("invalid_api_key")), "{wrong:?}");
        assert_eq!(server.post(CHAT, &chat("Hi", json!({}))).0, 401);
    }
    server.key = Some(KEY);
    assert_eq!(server.post(CHAT, &chat("Hi", json!({}))).0, 200);

    let open = |more: &[&str]| {
        let arguments = ["serve", "--run", path(&run), "--device", "cpu", "--listen", "0.0.0.0:0"];
        let mut command = lockstep(&[&arguments, more].concat(), &[]);
        command.env_remove("LOCKSTEP_API_KEY");
        command
    };
    let said = fail(open(&[]), 2);
    assert!(said.contains("--api-key-file") && said.contains("--insecure"), "{said}");
    fs::write(&key, " \n").unwrap();
    assert!(fail(open(&["--api-key-file", path(&key)]), 2).contains("one word"));
}

#[test]
fn openais_own_client_finds_what_it_expects() {
    let Some(python) = python("openais_own_client_finds_what_it_expects", &["openai"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = tiny_model(dir.path());
    let arguments =
        ["serve", "--run", path(&run), "--listen", "127.0.0.1:0", "--device", "cpu", "--model-name", "tiny-1"];
    let mut command = lockstep(&arguments, &[]);
    command.env("LOCKSTEP_API_KEY", KEY);
    let server = Server { key: Some(KEY), ..Server::of(command) };
    let mut client = Command::new(python);
    client.arg(workspace("deploy/tests/peer/openai_client.py"));
    client.args([&format!("{}/v1", server.url), KEY, "tiny-1"]);
    let answer: Value = serde_json::from_slice(&succeed(client).stdout).unwrap();
    let body = json!({ "messages": [{ "role": "user", "content": "Who is there?" }], "seed": 7, "max_tokens": 12 });
    assert_eq!(server.post(CHAT, &body).1["choices"][0]["message"]["content"], answer);
}

/// A stream whose first text has come, so that it runs.
fn begun(server: &Server, max_tokens: usize) -> BufReader<ureq::BodyReader<'static>> {
    let body = chat("Tell me all.", json!({ "stream": true, "max_tokens": max_tokens }));
    let mut stream = BufReader::new(server.open(CHAT, &body).into_body().into_reader());
    let mut line = String::new();
    while !line.contains("\"content\":\"") || line.contains("\"role\"") {
        line.clear();
        assert!(stream.read_line(&mut line).unwrap() > 0, "the stream ended before it began");
    }
    stream
}

#[test]
fn clients_that_hang_up_are_forgotten() {
    const CLIENTS: usize = 50;
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&tiny_model(dir.path()), &["--sequences", "8", "--queue", "100", "--threads", "2"]);
    // As much memory as it is to have: every slot was filled once.
    let full = json!({ "prompt": vec!["x"; 8], "max_tokens": CONTEXT - 1 });
    assert_eq!(server.post(COMPLETIONS, &full).0, 200);
    let before = peak_kib(&server);
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let server = &server;
            scope.spawn(move || match client % 2 {
                0 if client % 4 == 0 => drop(begun(server, 1900)),
                // Whole answers are nobody's before their first byte, too.
                0 => hang_up_unanswered(server),
                _ => {
                    let more = json!({ "stream": true, "max_tokens": 100, "seed": client });
                    let (events, done) = server.stream(CHAT, &chat("Tell me more.", more));
                    assert!(done && events.last().unwrap()["choices"][0]["finish_reason"].is_string());
                }
            });
        }
    });
    server.wait_for_load((0, 0));
    let after = peak_kib(&server);
    println!("peak memory: {before} KiB with all caches full, {after} KiB after {CLIENTS} clients");
    assert!(after < before + 32 * 1024, "{before} KiB before, {after} KiB after");
}

/// Asks for a whole answer, and goes.
fn hang_up_unanswered(server: &Server) {
    let body = chat("Tell me all.", json!({ "max_tokens": 1900 })).to_string();
    server.begin(body.len()).write_all(body.as_bytes()).unwrap();
}

/// Most memory that the server had so far; 0 where the system does not tell.
fn peak_kib(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.process.id())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or(0, |line| line.trim().trim_end_matches(" kB").parse().unwrap())
}

#[test]
fn who_waits_is_counted_and_who_finds_no_place_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&tiny_model(dir.path()), &["--sequences", "1", "--queue", "1"]);
    let running = begun(&server, 2000);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| server.post(CHAT, &chat("And me?", json!({}))));
        server.wait_for_load((1, 1));
        let refused = server.open(CHAT, &chat("And me, too?", json!({})));
        assert_eq!(refused.headers()["retry-after"], "1");
        let (status, error) = answer(refused);
        assert_eq!((status, &error["error"]["code"]), (429, &json!("queue_full")), "{error}");
        // One that hangs up makes room for the next.
        drop(running);
        assert_eq!(waiting.join().unwrap().0, 200);
    });
    server.wait_for_load((0, 0));
}

#[cfg(unix)]
#[test]
fn a_server_that_is_asked_to_stop_finishes_what_it_began() {
    let dir = tempfile::tempdir().unwrap();
    let run = tiny_model(dir.path());
    let mut server = Server::start(&run, &[]);
    let stream = begun(&server, 2000);
    server.process.signal("TERM");
    while server.get("/healthz").0 == 200 {}
    let (status, error) = server.post(CHAT, &chat("Me, too?", json!({})));
    assert_eq!((status, &error["error"]["code"]), (503, &json!("server_stopping")));
    assert!(events(stream).1, "the stream came to its end");
    assert_eq!(server.process.wait(), Some(0), "{}", server.process.said);

    // Without time to finish, the stream ends in an error.
    let mut server = Server::start(&run, &["--grace-secs", "0"]);
    let stream = begun(&server, 2000);
    server.process.signal("INT");
    let (events, done) = events(stream);
    assert!(!done && events.last().unwrap()["error"]["code"] == "server_stopping", "{:?}", events.last());
    assert_eq!(server.process.wait(), Some(0), "{}", server.process.said);
}

#[test]
fn a_conversation_comes_through_a_pipe() {
    let dir = tempfile::tempdir().unwrap();
    let (run, kept) = (tiny_model(dir.path()), dir.path().join("chats.jsonl"));
    let talk = |lines: &str| {
        let arguments = ["chat", "--run", path(&run), "--device", "cpu", "--tokens", "20", "--system", "Be brief."];
        let mut command = lockstep(&arguments, &[]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    };
    let save = format!("/save {}\n", path(&kept));
    let (answers, said) =
        talk(&format!("Who is there?\n\nAnd you?\n{save}/reset\n/nonsense\n/system\nHi\n{save}/quit\nno"));
    assert!(said.contains("not trained for conversations") && said.contains("/nonsense is no command"), "{said}");
    let chats = fs::read_to_string(&kept).unwrap();
    let chats: Vec<Value> = chats.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let roles = |chat: &Value| -> Vec<String> {
        let messages = chat["messages"].as_array().unwrap();
        messages.iter().map(|message| message["role"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(roles(&chats[0]), ["system", "user", "assistant", "user", "assistant"]);
    assert_eq!(roles(&chats[1]), ["user", "assistant"]);
    let answer = |chat: usize, turn: usize| chats[chat]["messages"][turn]["content"].as_str().unwrap();
    for answer in [answer(0, 2), answer(0, 4), answer(1, 1)] {
        assert!(answers.contains(answer) && !answer.is_empty(), "{answer:?} is not in {answers:?}");
    }
    // The same words again have the same answers.
    assert!(answers.starts_with(&talk("Who is there?\n\nAnd you?\n").0), "{answers:?}");

    // What the model has no room for is forgotten, the oldest first, and what never fits is said.
    let long = "x".repeat(CONTEXT / 2);
    let (_, said) = talk(&format!("{long}\n{long}\n{long}{long}\nHi\n"));
    assert!(said.contains("the 2 oldest turns are forgotten") && said.contains("say it in fewer words"), "{said}");
    let said = fail(lockstep(&["chat", "--run", path(&run), "--tokens", "2048"], &[]), 2);
    assert!(said.contains("leave room"), "{said}");
}

#[test]
fn the_page_talks_with_the_model() {
    const TEST: &str = "the_page_talks_with_the_model";
    let Some(chromium) = chromium(TEST) else { return };
    let Some(python) = python(TEST, &["json"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&tiny_model(dir.path()), &[]);
    let mut browser = Command::new(python);
    browser.arg(workspace("deploy/tests/peer/chat_page.py")).args([chromium, server.url.as_str()]);
    let answer: Value = serde_json::from_slice(&succeed(browser).stdout).unwrap();
    assert!(answer.as_str().is_some_and(|answer| !answer.trim().is_empty()), "{answer}");
    server.wait_for_load((0, 0));
}
