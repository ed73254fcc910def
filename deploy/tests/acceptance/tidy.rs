//! The shape of the code: who may know whom, and what pure code may not name.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cluster::workspace;

/// Crates of this project that each may depend on.
const DIRECTION: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("model", &[]),
    ("coordinator", &["lockstep-model", "lockstep-proto"]),
    ("worker", &["lockstep-model", "lockstep-proto"]),
    ("deploy", &["lockstep-coordinator", "lockstep-model", "lockstep-proto", "lockstep-worker"]),
];

/// Code that decides or computes, and so names no clock, socket, task or source of randomness.
const PURE: &[&str] = &["model/src", "coordinator/src/engine", "worker/src/session.rs"];
const IMPURE: &[&str] =
    &["Instant::now", "SystemTime", "std::net", "tokio", "async fn", ".await", "thread::sleep", "rand::", "HashMap<"];

fn sources(path: &Path, found: &mut Vec<PathBuf>) {
    if path.is_file() {
        found.extend((path.extension().is_some_and(|e| e == "rs")).then(|| path.to_path_buf()));
        return;
    }
    for entry in fs::read_dir(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())) {
        sources(&entry.unwrap().path(), found);
    }
}

#[test]
fn dependencies_point_one_way() {
    for (room, allowed) in DIRECTION {
        let manifest = fs::read_to_string(workspace(room).join("Cargo.toml")).unwrap();
        let manifest: toml::Table = manifest.parse().unwrap();
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(dependencies) = manifest.get(section).and_then(|section| section.as_table()) else { continue };
            let ours = dependencies.keys().filter(|name| name.starts_with("lockstep"));
            for name in ours {
                assert!(allowed.contains(&name.as_str()), "{room} must not depend on {name}");
            }
        }
    }
}

#[test]
fn pure_code_names_no_clock_socket_or_chance() {
    let mut files = Vec::new();
    PURE.iter().for_each(|path| sources(&workspace(path), &mut files));
    assert!(files.len() > 20);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            for name in IMPURE {
                assert!(!line.contains(name), "{}:{}: names {name}", file.display(), number + 1);
            }
        }
    }
}

#[test]
fn the_top_level_holds_these_rooms_alone() {
    let is_room = |entry: &fs::DirEntry| entry.path().is_dir() && entry.path().join("Cargo.toml").exists();
    let rooms = fs::read_dir(workspace(".")).unwrap().map(|entry| entry.unwrap()).filter(is_room);
    let mut rooms: Vec<String> = rooms.map(|room| room.file_name().into_string().unwrap()).collect();
    rooms.sort();
    assert_eq!(rooms, ["coordinator", "deploy", "model", "proto", "worker"]);
}
