//! Judgements of people: real processes, sockets and files, and a real browser.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::cluster::{fail, lockstep, path, python, succeed, text, workspace};
use crate::server::{Server, answer, chromium, send, tiny_model};

const PROMPTS: [&str; 5] =
    ["Who is there?", "学而时习之，何如？", "<img src=x onerror=alert(1)><b>And</b> you?", "Why?", "How?"];

/// A model, and prompts for it.
struct Place {
    dir: tempfile::TempDir,
    run: PathBuf,
    prompts: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (run, prompts) = (tiny_model(dir.path()), dir.path().join("prompts.jsonl"));
        let lines = PROMPTS.iter().map(|prompt| json!({ "prompt": prompt }).to_string() + "\n");
        fs::write(&prompts, lines.collect::<String>()).unwrap();
        Self { dir, run, prompts }
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut arguments = vec!["rate", "--run", path(&self.run), "--device", "cpu", "--max-tokens", "40"];
        arguments.extend(["--listen", "127.0.0.1:0"].into_iter().filter(|_| !more.contains(&"--listen")));
        lockstep(&[&arguments, more].concat(), &[])
    }

    /// A server that goes through the prompts.
    fn rate(&self, more: &[&str]) -> Server {
        Server::of(self.command(&[&["--prompts", path(&self.prompts)], more].concat()))
    }

    /// The lines of the file that judgements go to.
    fn lines(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.out()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn out(&self) -> PathBuf {
        self.run.join("preferences.jsonl")
    }
}

fn state(server: &Server) -> Value {
    let (status, state) = server.get("/api/state");
    assert_eq!((status, &state["waiting"]), (200, &json!(false)), "{state}");
    state
}

fn judge(server: &Server, id: &Value, choice: &str) -> (u16, Value) {
    server.post("/api/judgements", &json!({ "id": id, "choice": choice }))
}

/// A request that is refused.
fn refused(server: &Server, path: &str, body: Value) -> (u16, String) {
    let (status, error) = server.post(path, &body);
    assert!(error["error"]["message"].as_str().is_some_and(|said| !said.is_empty()), "{error}");
    (status, error["error"]["code"].as_str().unwrap_or_default().into())
}

#[test]
fn each_judgement_is_a_line_and_a_restart_goes_on() {
    let place = Place::new();
    let server = place.rate(&[]);
    let first = state(&server);
    assert_eq!((&first["rater"], &first["judged"], &first["total"]), (&json!("rater"), &json!(0), &json!(5)));
    let pair = &first["pair"];
    assert_ne!(pair["answers"][0], pair["answers"][1]);

    // Eight at once, as of an impatient finger: one line.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(judge(&server, &pair["id"], "second").0, 200));
        }
    });
    let lines = place.lines();
    assert_eq!(lines.len(), 1);
    let line = &lines[0];
    assert_eq!((&line["chosen"], &line["rejected"]), (&pair["answers"][1], &pair["answers"][0]), "{line}");
    assert_eq!(
        (&line["prompt"], &line["choice"], &line["rater"]),
        (&pair["prompt"], &json!("second"), &json!("rater"))
    );
    assert_ne!(line["seeds"][0], line["seeds"][1]);

    // Another tab, where the pair is judged otherwise; and what makes no sense.
    let judgements = "/api/judgements";
    let refusals = [
        (judgements, json!({ "id": pair["id"], "choice": "first" }), (409, "judged_otherwise")),
        (judgements, json!({ "id": "0123456789abcdef", "choice": "first" }), (404, "unknown_pair")),
        (judgements, json!({ "id": "nonsense", "choice": "first" }), (400, "")),
        (judgements, json!({ "id": pair["id"], "choice": "best" }), (400, "")),
        (judgements, json!({ "id": pair["id"] }), (400, "")),
        (judgements, json!({ "id": pair["id"], "choice": "tie", "why": "x" }), (400, "unsupported_parameter")),
        ("/api/undo", json!({ "id": "0123456789abcdef" }), (404, "unknown_judgement")),
        ("/api/prompts", json!({ "prompt": "Hi" }), (409, "prompts_given")),
        ("/api/nothing", json!({}), (404, "unknown_url")),
    ];
    for (path, body, (status, code)) in refusals {
        assert_eq!(refused(&server, path, body.clone()), (status, code.to_string()), "{path} {body}");
    }
    let plain = server.request("POST", judgements).header("content-type", "text/plain");
    assert_eq!(answer(send(plain, Some("{}".into()))).0, 415, "other sites' pages can send this");
    assert_eq!(answer(send(server.request("GET", "/api/state").header("host", "evil.example"), None)).0, 403);

    // Taken back, once or twice, the pair is here again, and judged by another id.
    let (second, third) = (state(&server), json!({ "id": pair["id"] }));
    assert_eq!(second["last"], json!({ "id": pair["id"], "choice": "second" }));
    for _ in 0..2 {
        assert_eq!(server.post("/api/undo", &third).0, 200);
    }
    let again = state(&server);
    assert_eq!((&again["judged"], &again["last"]), (&json!(0), &Value::Null));
    assert_eq!(again["pair"]["answers"], pair["answers"]);
    assert_eq!(again["pair"]["id"], format!("{}-2", pair["id"].as_str().unwrap()));
    assert_eq!(refused(&server, judgements, json!({ "id": pair["id"], "choice": "second" })).1, "taken_back");
    // The other tab still shows the pair after it.
    assert_eq!(judge(&server, &second["pair"]["id"], "tie").0, 200);
    assert_eq!(place.lines().len(), 3);

    // A crash in the middle of a line.
    let next = state(&server);
    let mut server = server;
    server.process.kill();
    OpenOptions::new().append(true).open(place.out()).unwrap().write_all(b"{\"id\":\"01234567").unwrap();
    let mut server = place.rate(&[]);
    assert!(server.process.said.contains("the last line was cut off"), "{}", server.process.said);
    assert!(server.process.said.contains("judged so far: rater 1 of 5"), "{}", server.process.said);
    assert_eq!(state(&server), next);
    for (judged, choice) in ["first", "both_bad", "second", "tie"].into_iter().enumerate() {
        let now = state(&server);
        assert_eq!(now["judged"], judged + 1);
        assert_eq!(judge(&server, &now["pair"]["id"], choice).0, 200);
    }
    let end = state(&server);
    assert_eq!((&end["pair"], &end["judged"]), (&Value::Null, &json!(5)));
    let asked: std::collections::BTreeSet<String> =
        place.lines().iter().filter_map(|line| Some(line["prompt"][0]["content"].as_str()?.into())).collect();
    assert_eq!(asked, PROMPTS.map(String::from).into());

    server.process.signal("INT");
    assert_eq!(server.process.wait(), Some(0), "{}", server.process.said);
    let said = &server.process.said;
    assert!(said.contains("by rater 5: 2 choices, 2 ties, 1 times both bad"), "{said}");
    assert!(said.contains("lockstep train dpo --set init=") && said.contains("preferences.jsonl"), "{said}");
    // What it says is trained on reads the same there.
    let sets = [format!("init={}", path(&place.run)), format!("data.input={}", path(&place.out()))];
    let sets = [&*sets[0], &*sets[1], "data.train_fraction=0.5"];
    let check = succeed(lockstep(&["check", "dpo", "--worker-tokens-per-sec", "1000"], &sets));
    let found = "6 judgements found, of which 3 prefer neither answer, 1 were taken back, 0 have equal answers, 0 an empty turn";
    assert!(text(&check.stderr).contains(found), "{}", text(&check.stderr));
}

#[test]
fn raters_are_told_apart_by_their_tokens() {
    let place = Place::new();
    let raters = place.dir.path().join("raters");
    fs::write(&raters, "ann=sesame\n\n# 安 = her own\n安=open-sesame\n").unwrap();
    let mut server = place.rate(&["--raters", path(&raters), "--rounds", "2"]);
    for (name, token) in [("ann", "sesame"), ("安", "open-sesame")] {
        let line = server.process.wait_for(&format!("  {name}: "));
        assert_eq!(line.trim(), format!("{name}: {}/?token={token}", server.url));
    }
    for wrong in [None, Some("sesam"), Some("")] {
        server.key = wrong;
        assert_eq!(server.get("/api/state").0, 401);
        assert_eq!(refused(&server, "/api/judgements", json!({})), (401, "invalid_api_key".into()));
    }
    let mut last = Value::Null;
    for (token, name, count) in [("sesame", "ann", 3), ("open-sesame", "安", 2)] {
        server.key = Some(token);
        for judged in 0..count {
            let now = state(&server);
            assert_eq!((&now["rater"], &now["judged"], &now["total"]), (&json!(name), &json!(judged), &json!(10)));
            // Another's judgement is nobody else's to take back, nor to make.
            assert_eq!(refused(&server, "/api/undo", json!({ "id": "0000000000000000" })).0, 404);
            if last != Value::Null {
                assert_eq!(refused(&server, "/api/undo", json!({ "id": last })).1, "unknown_judgement");
                assert_eq!(
                    refused(&server, "/api/judgements", json!({ "id": last, "choice": "tie" })).1,
                    "unknown_pair"
                );
            }
            assert_eq!(judge(&server, &now["pair"]["id"], "first").0, 200);
        }
        last = state(&server)["last"]["id"].clone();
    }
    assert_eq!(state(&server)["rater"], "安");
    let prompts = |name: &str| -> Vec<Value> {
        place.lines().into_iter().filter(|line| line["rater"] == name).map(|line| line["prompt"].clone()).collect()
    };
    assert_ne!(prompts("ann")[..2], prompts("安")[..]);
    server.process.signal("TERM");
    assert_eq!(server.process.wait(), Some(0), "{}", server.process.said);
    assert!(server.process.said.contains("by ann 3, 安 2"), "{}", server.process.said);

    // Who rates no more is counted, and asked no more.
    let server = place.rate(&["--rater", "ann=sesame"]);
    assert!(server.process.said.contains("judged so far: ann 3 of 5"), "{}", server.process.said);
    let said = fail(place.command(&[]), 1);
    assert!(said.contains("preferences.jsonl: another process is writing"), "{said}");
}

#[test]
fn what_cannot_be_is_refused_before_anything_starts() {
    let place = Place::new();
    let said = fail(place.command(&["--listen", "0.0.0.0:0"]), 2);
    assert!(said.contains("--rater NAME=TOKEN") && said.contains("--insecure"), "{said}");
    assert!(fail(place.command(&["--rater", "ann"]), 2).contains("no NAME=TOKEN"));
    assert!(fail(place.command(&["--temperature", "0"]), 2).contains("a number above 0"));
    assert!(fail(place.command(&["--top-p", "2"]), 2).contains("top-p 2"));
    let file = |name: &str, text: &str| {
        let file = place.dir.path().join(name);
        fs::write(&file, text).unwrap();
        file
    };
    let open = Server::of(place.command(&["--listen", "0.0.0.0:0", "--insecure"]));
    let foreign = open.request("GET", "/api/state").header("host", "rate.example");
    assert_eq!(answer(send(foreign, None)).0, 200);
    drop(open);
    let nobody = file("nobody", "# nobody\n");
    assert!(fail(place.command(&["--raters", path(&nobody)]), 2).contains("no rater is in it"));
    let bad = file("bad.jsonl", "{\"prompt\":\"a\"}\n{\"text\":\"b\"}\n");
    assert!(fail(place.command(&["--prompts", path(&bad)]), 1).contains("bad.jsonl: line 2"));
    let other = file("other.jsonl", "{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"c\"}\n");
    let said = fail(place.command(&["--out", path(&other)]), 1);
    assert!(said.contains("other.jsonl: line 1: ") && said.contains("--out"), "{said}");
    let long = file("long.txt", &format!("{}\n", "x".repeat(3000)));
    let said = fail(place.command(&["--prompts", path(&long)]), 1);
    assert!(said.contains("the model does not read 1 of them") && said.contains("nothing to ask"), "{said}");
    let some = file("some.txt", &format!("one\n{}\none\n", "x".repeat(3000)));
    let server = Server::of(place.command(&["--prompts", path(&some)]));
    assert!(server.process.said.contains("3 prompts found, of which 1 stand there before; the model does not read 1"));
    assert_eq!(state(&server)["total"], 1);
}

#[test]
fn an_answer_is_what_serve_gives_to_its_seed() {
    let place = Place::new();
    let server = place.rate(&["--temperature", "0.9", "--top-p", "0.8", "--seed", "7"]);
    assert_eq!(judge(&server, &state(&server)["pair"]["id"], "tie").0, 200);
    drop(server);
    let line = &place.lines()[0];
    assert_eq!(line["finish"], json!(["length", "length"]));
    let serve =
        Server::of(lockstep(&["serve", "--run", path(&place.run), "--listen", "127.0.0.1:0", "--device", "cpu"], &[]));
    for (seed, text) in line["seeds"].as_array().unwrap().iter().zip(line["answers"].as_array().unwrap()) {
        let body = json!({
            "messages": line["prompt"], "seed": seed, "temperature": line["temperature"], "top_p": line["top_p"], "max_tokens": 40
        });
        let (status, answer) = serve.post("/v1/chat/completions", &body);
        let said = answer["choices"][0]["message"]["content"].as_str().unwrap();
        assert_eq!((status, said.trim_end()), (200, text.as_str().unwrap()), "{answer}");
    }
}

#[test]
fn raters_who_hang_up_lose_nothing() {
    let place = Place::new();
    let server = place.rate(&[]);
    let begin = |head: String, body: &str| {
        let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
        write!(stream, "{head} HTTP/1.1\r\nhost: localhost\r\n").unwrap();
        write!(stream, "content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    };
    // Gone before there is a pair, which is here all the same for who comes back.
    begin("GET /api/state".into(), "");
    let now = state(&server);
    // Gone before the answer: the judgement counts.
    begin("POST /api/judgements".into(), &json!({ "id": now["pair"]["id"], "choice": "tie" }).to_string());
    while state(&server)["judged"] == 0 {}
    assert_eq!(place.lines().len(), 1);
    // Gone in the middle of a request: nothing is judged.
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
    let head = "host: localhost\r\ncontent-type: application/json\r\ncontent-length: 100";
    write!(stream, "POST /api/judgements HTTP/1.1\r\n{head}\r\n\r\n{{\"id\":").unwrap();
    drop(stream);
    assert_eq!(state(&server)["judged"], 1);
}

#[test]
fn prompts_may_be_written_as_one_goes() {
    let place = Place::new();
    let server = Server::of(place.command(&[]));
    let empty = state(&server);
    assert_eq!((&empty["typed"], &empty["pair"], &empty["total"]), (&json!(true), &Value::Null, &Value::Null));
    assert_eq!(refused(&server, "/api/prompts", json!({ "prompt": " " })).0, 400);
    assert_eq!(refused(&server, "/api/prompts", json!({ "prompt": "x".repeat(3000) })).0, 400);
    let mut seen = Vec::new();
    for judged in 1..=2 {
        assert_eq!(server.post("/api/prompts", &json!({ "prompt": " Who is there? " })).0, 200);
        assert_eq!(refused(&server, "/api/prompts", json!({ "prompt": "And you?" })).1, "pair_waits");
        let now = state(&server);
        assert_eq!(now["pair"]["prompt"], json!([{ "role": "user", "content": "Who is there?" }]));
        seen.push(now["pair"]["answers"].clone());
        assert_eq!(judge(&server, &now["pair"]["id"], "first").1["judged"], judged);
    }
    assert_ne!(seen[0], seen[1], "the same again has other answers");
}

#[test]
fn clicks_and_keys_become_lines() {
    const TEST: &str = "clicks_and_keys_become_lines";
    let Some(chromium) = chromium(TEST) else { return };
    let Some(python) = python(TEST, &["json"]) else { return };
    let place = Place::new();
    let drive = |server: &Server, what: &str| -> Value {
        let mut browser = Command::new(&python);
        browser.arg(workspace("deploy/tests/peer/rate_page.py")).args([chromium, &server.url, what]);
        if let Some(pictures) = std::env::var_os("LOCKSTEP_PICTURES") {
            browser.arg(pictures);
        }
        serde_json::from_slice(&succeed(browser).stdout).unwrap()
    };
    let mut server = place.rate(&["--rater", "ann=sesame"]);
    let begun = drive(&server, "begin");
    server.process.kill();
    let server = place.rate(&["--rater", "ann=sesame"]);
    let ended = drive(&server, "go-on");
    let done: Vec<&Value> = begun.as_array().unwrap().iter().chain(ended.as_array().unwrap()).collect();
    let lines = place.lines();
    assert_eq!(lines.len(), done.len(), "{lines:?}\n{done:?}");
    for (line, done) in lines.iter().zip(done) {
        match done.get("undo") {
            Some(id) => assert_eq!(&line["undo"], id),
            None => {
                assert_eq!(
                    (&line["id"], &line["choice"], &line["prompt"]),
                    (&done["id"], &done["choice"], &done["prompt"])
                );
                let answers = &done["answers"];
                match line["choice"].as_str().unwrap() {
                    "first" => assert_eq!([&line["chosen"], &line["rejected"]], [&answers[0], &answers[1]]),
                    "second" => assert_eq!([&line["chosen"], &line["rejected"]], [&answers[1], &answers[0]]),
                    _ => assert_eq!(&line["answers"], answers),
                }
            }
        }
    }
    drop(server);
    fs::remove_file(place.out()).unwrap();
    let typed = drive(&Server::of(place.command(&[])), "write");
    assert_eq!(
        place.lines().iter().map(|line| &line["prompt"][0]["content"]).collect::<Vec<_>>(),
        typed.as_array().unwrap().iter().collect::<Vec<_>>()
    );
}
