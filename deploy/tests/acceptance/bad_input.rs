//! Bad input: what happened, where and what to do, the right exit status, and nothing broken.

use std::fs;
use std::net::TcpListener;

use crate::cluster::{SMALL, coordinator, fail, fingerprint, inspect, lockstep, path, skip, succeed, worker};

#[test]
fn recipes_and_flags_that_make_no_sense_are_usage_errors() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let train = |overrides: &[&str]| fail(lockstep(&["train", "quickstart", "--run", path(&run)], overrides), 2);
    for (wrong, key) in [("model.heads=5", "model.heads"), ("model.hedas=4", "model.heads"), ("seed=x", "seed")] {
        assert!(train(&[wrong]).contains(key), "{wrong}");
    }
    assert!(fail(lockstep(&["train", "quickstrat"], &[]), 2).contains("quickstart"));
    assert!(fail(lockstep(&["train", "--resume"], &[]), 2).contains("--run"));
    assert!(fail(lockstep(&["train", "--workers", "0"], &[]), 2).contains("0"));
    assert!(!run.exists(), "nothing was written");
}

#[test]
fn bad_corpora_are_named_with_file_and_offset() {
    let dir = tempfile::tempdir().unwrap();
    let (run, file) = (dir.path().join("run"), dir.path().join("text.txt"));
    let input = format!("data.input={}", path(&file));
    let train =
        |status| fail(lockstep(&["train", "quickstart", "--run", path(&run)], &[SMALL, &[&input]].concat()), status);
    assert!(train(1).contains("text.txt"), "no such file");
    fs::write(&file, "").unwrap();
    assert!(train(1).contains("empty"));
    fs::write(&file, b"0123456789\xFF").unwrap();
    let said = train(1);
    assert!(said.contains("text.txt") && said.contains("byte 10"), "{said}");
    fs::write(&file, "only forty characters or so, not enough.").unwrap();
    let said = train(2);
    assert!(said.contains("model.context"), "{said}");
    assert!(!run.exists(), "nothing was written");
}

#[test]
fn a_diverged_run_still_has_whole_files() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let train = ["train", "line", "--device", "cpu", "--run", path(&run)];
    let diverging = ["optimizer.lr=1e30", "optimizer.max_bad_steps=0", "checkpoint.stop_after=20"];
    succeed(lockstep(&train, &diverging));
    succeed(lockstep(&["train", "--device", "cpu", "--run", path(&run), "--resume"], &["checkpoint.stop_after=30"]));
    let shown = inspect(&run);
    assert_eq!((&shown["step"], &shown["train_loss"]), (&30.into(), &serde_json::Value::Null));
}

#[test]
fn a_port_in_use_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, run) = (taken.local_addr().unwrap().to_string(), dir.path().join("run"));
    let arguments = ["coordinator", "line", "--listen", &address, "--run", path(&run)];
    assert!(fail(lockstep(&arguments, &[]), 1).contains(&address));
}

#[test]
fn listening_beyond_this_machine_must_be_meant() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let said = fail(lockstep(&["coordinator", "line", "--listen", "0.0.0.0:0", "--run", path(&run)], &[]), 2);
    assert!(said.contains("--insecure") && said.contains("neither encrypted nor authenticated"), "{said}");
}

#[test]
fn a_run_is_neither_overwritten_nor_changed_nor_shared() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let arguments = ["train", "quickstart", "--device", "cpu", "--run", path(&run)];
    let stopped = [SMALL, &["checkpoint.stop_after=2"]].concat();
    succeed(lockstep(&arguments, &stopped));
    let before = fingerprint(&run);
    assert!(fail(lockstep(&arguments, &stopped), 1).contains("--resume"));
    let resume = [&arguments[..], &["--resume"]].concat();
    let said = fail(lockstep(&resume, &[SMALL, &["optimizer.lr=1.0"]].concat()), 2);
    assert!(said.contains("optimizer.lr"), "{said}");
    let (_first, _) = coordinator("quickstart", &run, &["--resume"], SMALL);
    let said = fail(lockstep(&resume, SMALL), 1);
    assert!(said.contains("another coordinator holds this run"), "{said}");
    assert_eq!(fingerprint(&run), before);
}

#[test]
fn a_status_tells_what_the_run_waits_for() {
    let dir = tempfile::tempdir().unwrap();
    let (_coordinator, address) = coordinator("quickstart", &dir.path().join("run"), &[], SMALL);
    let output = succeed(lockstep(&["status", &address, "--json"], &[]));
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&status["step"], &status["total_steps"]), (&0.into(), &24.into()));
    assert!(status["waiting_for"].as_str().unwrap().contains("worker"), "{status}");
}

#[test]
fn another_protocol_version_is_refused_in_words() {
    use lockstep_proto::v1::JoinRequest;
    use lockstep_proto::v1::lockstep_client::LockstepClient;
    use tonic::transport::Channel;

    let dir = tempfile::tempdir().unwrap();
    let (_coordinator, address) = coordinator("line", &dir.path().join("run"), &[], &[]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let refused = runtime.block_on(async {
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let request = JoinRequest { protocol_version: 99, name: "new".into(), device: "cpu".into() };
        LockstepClient::new(channel).join(request).await.unwrap_err()
    });
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("version 99") && refused.message().contains("same release"), "{refused}");
}

/// A file system that is unmounted with this value, whatever the test finds.
#[cfg(target_os = "linux")]
struct Mounted<'a>(&'a std::path::Path);

#[cfg(target_os = "linux")]
impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        // Lazily, since the processes that used it may still be ending.
        let _ = std::process::Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

/// A full disk, for real: a file system of one megabyte.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_the_run_and_breaks_nothing() {
    use std::process::Command;

    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs", path(&disk)]).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        skip("a_full_disk_ends_the_run_and_breaks_nothing", "this user may not mount a file system of one megabyte");
        return;
    }
    let _mounted = Mounted(&disk);
    let run = disk.join("run");
    // A checkpoint takes about 400 kB: two fit, the third does not.
    let overrides = [SMALL, &["checkpoint.keep_last=9", "checkpoint.every_steps=4"]].concat();
    let (mut coordinator, address) = coordinator("quickstart", &run, &[], &overrides);
    let _worker = worker(&address, "only");
    let status = coordinator.wait();
    let kept = inspect(&run);
    assert_eq!(status, Some(1), "{}", coordinator.said);
    assert!(coordinator.said.contains("Free space"), "{}", coordinator.said);
    assert!(kept["step"].as_u64().unwrap() >= 4, "the checkpoints before are whole");
}

/// A disk that can be read alone.
#[cfg(target_os = "linux")]
#[test]
fn a_read_only_run_is_verified_and_not_resumed() {
    use std::process::Command;

    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let mount =
        |options: &str| Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs", path(&disk)]).output();
    if !mount("size=4m").is_ok_and(|output| output.status.success()) {
        skip("a_read_only_run_is_verified_and_not_resumed", "this user may not mount a file system");
        return;
    }
    let _mounted = Mounted(&disk);
    let run = disk.join("run");
    let overrides = [SMALL, &["checkpoint.stop_after=8"]].concat();
    let (mut coordinator, address) = coordinator("quickstart", &run, &[], &overrides);
    let _worker = worker(&address, "only");
    assert_eq!(coordinator.wait(), Some(0), "{}", coordinator.said);
    let remounted = mount("remount,ro").unwrap();
    assert!(remounted.status.success(), "{}", String::from_utf8_lossy(&remounted.stderr));
    let said = fail(lockstep(&["train", "--run", path(&run), "--resume"], &overrides), 1);
    assert!(said.contains(path(&run)) && said.contains("Read-only"), "{said}");
    succeed(lockstep(&["verify", path(&run)], &[]));
}
