//! A server of the program's, and a small model for it.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::cluster::{Running, SMALL, lockstep, path, skip, succeed};

/// A run of a small model of bytes, in a directory called `tiny`.
pub(crate) fn tiny_model(dir: &Path) -> PathBuf {
    let run = dir.join("tiny");
    let shape = ["tokenizer.kind=bytes", "model.context=2048", "model.dropout=0", "batch.slots=1", "schedule.steps=12"];
    let arguments = ["train", "quickstart", "--device", "cpu", "--workers", "1", "--run", path(&run)];
    succeed(lockstep(
        &arguments,
        &[SMALL, &shape, &["batch.sequences_per_slot=1", "evaluation.every_steps=0"]].concat(),
    ));
    run
}

/// A server, which ends with this value.
pub(crate) struct Server {
    pub(crate) process: Running,
    /// Without a path.
    pub(crate) url: String,
    /// What requests bring to be let in.
    pub(crate) key: Option<&'static str>,
}

impl Server {
    /// Starts a command that says where it listens.
    pub(crate) fn of(command: Command) -> Self {
        let mut process = Running::start(command);
        let line = process.wait_for("listening on");
        let url = line.split_whitespace().find(|word| word.starts_with("http://")).expect("the line names the address");
        Self { process, url: url.into(), key: None }
    }

    /// A request to it, with its key.
    pub(crate) fn request(&self, method: &str, path: &str) -> ureq::http::request::Builder {
        let mut request = ureq::http::Request::builder().method(method).uri(format!("{}{path}", self.url));
        if let Some(key) = self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request
    }

    /// Status and body of what is there.
    pub(crate) fn get(&self, path: &str) -> (u16, Value) {
        answer(send(self.request("GET", path), None))
    }

    /// Status and body of what is answered.
    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        answer(self.open(path, body))
    }

    /// A response whose body is read by the caller.
    pub(crate) fn open(&self, path: &str, body: &Value) -> ureq::http::Response<ureq::Body> {
        send(self.request("POST", path).header("content-type", "application/json"), Some(body.to_string()))
    }
}

/// Sends a request, and returns what comes of it, whatever its status.
pub(crate) fn send(request: ureq::http::request::Builder, body: Option<String>) -> ureq::http::Response<ureq::Body> {
    // A connection for each, so that dropping a response hangs up.
    let config = ureq::Agent::config_builder().http_status_as_error(false).max_idle_connections(0).build();
    let agent = config.new_agent();
    let response = match body {
        Some(body) => agent.run(request.body(body).unwrap()),
        None => agent.run(request.body(()).unwrap()),
    };
    response.expect("the server answers")
}

/// Status and body.
pub(crate) fn answer(mut response: ureq::http::Response<ureq::Body>) -> (u16, Value) {
    let status = response.status().as_u16();
    (status, response.body_mut().read_json().expect("it answers in JSON"))
}

/// A program that shows pages, or `None` after saying that the test skips.
pub(crate) fn chromium(test: &str) -> Option<&'static str> {
    let starts =
        |program: &&str| Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    let found = ["chromium", "chromium-browser", "google-chrome", "chrome"].into_iter().find(starts);
    if found.is_none() {
        skip(test, "no chromium, google-chrome or chrome is installed");
    }
    found
}
