//! The supervisor: separate processes, restarts, Ctrl-C, and clear words when something is wrong.

mod support;

use ridge_tests::cluster::{Cluster, fails, within};
use ridge_tests::model::prompt;
use ridge_tests::process::{Kill, Process, signal};
use std::net::TcpListener;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use support::{binary, complete, oracle, tiny_llama};

#[test]
fn roles_are_processes_and_ctrl_c_ends_them_all() {
    let cluster = Cluster::start(binary(), &tiny_llama(), &["--decode", "2"]);
    let mut roles: Vec<String> = cluster.processes().iter().map(|process| process.args[1].clone()).collect();
    roles.sort();
    assert_eq!(roles, ["decode", "decode", "prefill", "router"]);
    let banner = cluster.output();
    for process in cluster.processes() {
        assert!(banner.contains(&process.pid.to_string()), "the banner does not show {}: {banner}", process.pid);
    }
    assert!(banner.contains("curl"), "{banner}");
    // `stop` fails if a process is left.
    let (status, output) = cluster.stop();
    assert!(status.success(), "{status}\n{output}");
}

#[test]
fn a_killed_child_is_restarted_and_reported() {
    let model = tiny_llama();
    let cluster = Cluster::start(binary(), &model, &[]);
    let prompt = prompt(3, 60);
    let expected = oracle(&model, &prompt, 12, &[]).text;
    for name in ["decode-0", "prefill-0", "router"] {
        let old = cluster.process(name).pid;
        signal(old, Kill::Kill);
        let restarted = || cluster.output().contains(&format!("{name} is back"));
        assert!(within(Duration::from_secs(60), restarted), "{name} did not come back\n{}", cluster.output());
        assert_ne!(cluster.process(name).pid, old);
        assert!(cluster.output().contains(&format!("{name} died (signal: 9 (SIGKILL)); restart 1")));
        cluster.wait_healthy();
        assert_eq!(complete(&cluster, &prompt, 12), expected, "after {name} was killed");
    }
    cluster.wait_idle();
}

#[test]
fn a_child_that_keeps_dying_ends_the_cluster() {
    let cluster = Cluster::start(binary(), &tiny_llama(), &[]);
    let supervisor = cluster.pid();
    let mut killed = 0;
    let over = within(Duration::from_secs(90), || {
        let decode = Process::children_of(supervisor).into_iter().find(|p| p.flag("--name") == Some("decode-0"));
        if let Some(process) = decode {
            signal(process.pid, Kill::Kill);
            killed += 1;
        }
        !Process::is_alive(supervisor)
    });
    assert!(over, "the supervisor goes on after {killed} crashes\n{}", cluster.output());
    let output = cluster.output();
    assert!(output.contains("decode-0 died 6 times within a minute"), "{output}");
    assert!(output.contains("giving up"), "{output}");
}

#[test]
fn children_do_not_outlive_a_killed_supervisor() {
    Cluster::start(binary(), &tiny_llama(), &[]).kill_supervisor();
}

#[test]
fn two_clusters_share_a_data_folder() {
    let data = Arc::new(tempfile::tempdir().expect("a temp dir"));
    let model = tiny_llama();
    let one = Cluster::start_in(&data, binary(), &model, &[]);
    let two = Cluster::start_in(&data, binary(), &model, &[]);
    let prompt = prompt(4, 40);
    assert_eq!(complete(&one, &prompt, 8), complete(&two, &prompt, 8));
    one.stop();
    complete(&two, &prompt, 8);
    two.stop();
    let left: Vec<_> = std::fs::read_dir(data.path().join("run")).expect("is there").flatten().collect();
    assert!(left.is_empty(), "certificates are left: {left:?}");
}

#[test]
fn logs_go_to_files_if_asked() {
    let logs = tempfile::tempdir().expect("a temp dir");
    let folder = logs.path().join("logs").display().to_string();
    let cluster = Cluster::start(binary(), &tiny_llama(), &["--log-dir", &folder]);
    for name in ["router", "prefill-0", "decode-0"] {
        let path = logs.path().join("logs").join(format!("{name}.log"));
        assert!(path.is_file(), "{} is missing", path.display());
    }
    assert!(!cluster.output().contains("[decode-0]"), "{}", cluster.output());
}

fn up(flags: &[&str]) -> Command {
    let data = std::env::temp_dir().join(format!("ridge-fails-{}", std::process::id()));
    let mut command = Command::new(binary());
    command.args(["up", "--local", "--data-dir"]).arg(data).args(flags);
    command
}

#[test]
fn mistakes_are_explained() {
    let model = tiny_llama().display().to_string();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("is bound").port().to_string();
    let error = fails(&mut up(&["--model", &model, "--port", &port]));
    assert!(error.contains(&format!("port {port} on 127.0.0.1 is in use")), "{error}");
    assert!(error.contains("--port"), "{error}");

    let error = fails(&mut up(&["--model", "/no/such/folder", "--port", "0"]));
    assert!(error.contains("/no/such/folder"), "{error}");

    let empty = tempfile::tempdir().expect("a temp dir");
    let path = empty.path().display().to_string();
    let error = fails(&mut up(&["--model", &path, "--port", "0"]));
    assert!(error.contains("failed to start"), "{error}");

    let error = fails(&mut up(&["--model", &model, "--port", "0", "--max-model-len", "100000"]));
    assert!(error.contains("100000"), "{error}");

    let error = fails(&mut up(&["--model", &model, "--block-size", "12"]));
    assert!(error.contains("power of two"), "{error}");
}
