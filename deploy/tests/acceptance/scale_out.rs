//! The scripts that spread a run over processes and machines, against real ssh servers.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::cluster::{Running, SMALL, fingerprint, inspect, lockstep, path, skip, succeed, text, workspace};

/// A script of `deploy/` that runs the program under test, with `--set` for each override.
fn script(name: &str, arguments: &[&str], overrides: &[&str]) -> Command {
    let mut command = Command::new(workspace("deploy").join(name));
    command.args(arguments).args(overrides.iter().flat_map(|set| ["--set", set])).stdin(Stdio::null());
    command.env("LOCKSTEP", env!("CARGO_BIN_EXE_lockstep")).env("WORKER_OPTIONS", "--device cpu --threads 1");
    command
}

fn train(run: &Path, overrides: &[&str]) {
    let arguments = ["train", "quickstart", "--device", "cpu", "--run", path(run)];
    succeed(lockstep(&arguments, &[SMALL, overrides].concat()));
}

#[test]
fn a_coordinator_and_workers_by_script_are_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let (by_script, by_train) = (dir.path().join("script"), dir.path().join("train"));
    succeed(script("local.sh", &["3", "quickstart", "--run", path(&by_script)], SMALL));
    train(&by_train, &[]);
    assert_eq!(fingerprint(&by_script), fingerprint(&by_train));
    assert!(by_script.join("logs/worker-3.log").exists());

    // What the coordinator refuses ends the script, and no worker is left waiting.
    let refused = script("local.sh", &["2", "no-such-recipe", "--run", path(&dir.path().join("none"))], &[]).output();
    let refused = refused.expect("the script starts");
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused.stderr));
    assert!(text(&refused.stderr).contains("no-such-recipe"), "{}", text(&refused.stderr));
}

/// The `ssh` command for hosts named host-1 to host-9, each a server of its own on this machine with `home` for caches;
/// `None` after saying that the test skips.
fn ssh(test: &str, dir: &Path, home: &Path) -> Option<String> {
    let key = dir.join("key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", path(&key)]).status();
    if !made.is_ok_and(|status| status.success()) {
        skip(test, "no ssh-keygen here");
        return None;
    }
    // The client starts a server that speaks over its standard input: no port is taken and none is left behind.
    let server = dir.join("sshd_config");
    let config = dir.join("config");
    let (key, public) = (path(&key).to_string(), dir.join("key.pub"));
    let settings = format!(
        "HostKey {key}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\n\
         PermitRootLogin prohibit-password\nSetEnv XDG_CACHE_HOME={}\n",
        path(&public),
        path(home),
    );
    fs::write(&server, settings).unwrap();
    let settings = format!(
        "Host host-*\nProxyCommand /usr/sbin/sshd -i -f {}\nIdentityFile {key}\nIdentitiesOnly yes\nLogLevel ERROR\n\
         StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n",
        path(&server)
    );
    fs::write(&config, settings).unwrap();
    let greeted = Command::new("ssh").args(["-F", path(&config), "host-1", "echo hello"]).output();
    if let Some(failure) = match &greeted {
        Ok(output) if output.stdout == b"hello\n" => None,
        Ok(output) => Some(text(&output.stderr)),
        Err(error) => Some(error.to_string()),
    } {
        skip(test, &format!("no ssh server can be started here: {}", failure.trim()));
        return None;
    }
    Some(format!("ssh -F {}", path(&config)))
}

#[test]
fn hosts_come_and_go_through_ssh_and_leave_no_trace_in_the_parameters() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    let test = "hosts_come_and_go_through_ssh_and_leave_no_trace_in_the_parameters";
    let Some(ssh) = ssh(test, dir.path(), &home) else { return };
    let hosts = dir.path().join("hosts");
    let command = |arguments: &[&str], overrides: &[&str]| {
        let mut command = script("ssh.sh", &[&[path(&hosts)], arguments].concat(), overrides);
        command.env("LOCKSTEP_SSH", &ssh);
        command
    };
    let add = |host: &str| succeed(command(&["add", host, "--device", "cpu", "--threads", "1"], &[]));
    // Longer than it takes: it is the test that stops it.
    const LONG: &[&str] = &["schedule.steps=100000", "checkpoint.every_steps=0", "cluster.min_workers=2"];

    add("host-1");
    add("host-2");
    let run = dir.path().join("run");
    let mut running = Running::start(command(&["start", "quickstart", "--run", path(&run)], &[SMALL, LONG].concat()));
    running.wait_for("copying the program");
    running.wait_for("step 8: validation loss");
    succeed(command(&["remove", "host-1"], &[]));
    running.wait_for(" left: ");
    add("host-3");
    running.wait_for("joined: host-3");
    let status = text(&succeed(command(&["status"], &[])).stdout);
    assert!(status.contains("host-2") && status.contains("host-3") && !status.contains("host-1"), "{status}");
    let said = text(&succeed(command(&["logs", "host-3"], &[])).stdout);
    assert!(said.contains("connecting to the coordinator"), "{said}");
    let mut second = command(&["start", "quickstart"], &[]);
    let second = second.output().expect("the script starts");
    assert!(text(&second.stderr).contains("a run is going on with these hosts"), "{}", text(&second.stderr));
    succeed(command(&["stop"], &[]));
    assert_eq!(running.wait(), Some(0), "{}", running.said);

    let stopped = inspect(&run)["step"].as_u64().unwrap();
    let alone = dir.path().join("alone");
    train(&alone, &[LONG, &[&format!("checkpoint.stop_after={stopped}"), "cluster.min_workers=1"]].concat());
    assert_eq!(fingerprint(&run), fingerprint(&alone), "stopped at step {stopped}");
    assert_eq!(
        fs::read_dir(home.join("lockstep")).unwrap().count(),
        1,
        "hosts that share a directory share the program"
    );
}
