//! Several hosts on one machine: network namespaces joined by a bridge, with cables that can be slow, lossy and cut.
//!
//! It takes root and `ip`; delay and loss take the kernel's netem. Where one is missing, callers skip by name. Nothing outside the
//! namespaces is touched. Read [`Hosts`].

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

/// Hosts on one network. Dropping them removes them; whatever runs in them must have ended.
#[derive(Debug)]
pub struct Hosts {
    /// Begins the names of all namespaces.
    prefix: String,
    names: Vec<&'static str>,
}

impl Hosts {
    /// Hosts of these names, or why there can be none here.
    pub fn new(names: &[&'static str]) -> Result<Self, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            return Err("network namespaces take root".into());
        }
        let prefix = format!("ridge-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // From here on a failure removes what was made before it.
        let hosts = Self { prefix, names: names.to_vec() };
        let switch = hosts.namespace("switch");
        ip(&format!("netns add {switch}"))?;
        ip(&format!("-n {switch} link add bridge type bridge"))?;
        ip(&format!("-n {switch} link set bridge up"))?;
        for name in names {
            let (host, addr) = (hosts.namespace(name), hosts.addr(name));
            ip(&format!("netns add {host}"))?;
            ip(&format!("-n {switch} link add {name} type veth peer name cable netns {host}"))?;
            ip(&format!("-n {switch} link set {name} master bridge"))?;
            ip(&format!("-n {switch} link set {name} up"))?;
            ip(&format!("-n {host} addr add {addr}/24 dev cable"))?;
            ip(&format!("-n {host} link set lo up"))?;
            ip(&format!("-n {host} link set cable up"))?;
        }
        Ok(hosts)
    }

    fn namespace(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    /// A host's IP address.
    pub fn addr(&self, name: &str) -> String {
        let at = self.names.iter().position(|other| *other == name).expect("is one of the hosts");
        format!("10.77.0.{}", at + 1)
    }

    /// A command that runs a program on a host.
    pub fn command(&self, host: &str, program: &std::path::Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(host)]).arg(program);
        command
    }

    /// Moves this thread to a host: its sockets are that host's from now on.
    pub fn enter(&self, host: &str) {
        let file = File::open(format!("/run/netns/{}", self.namespace(host))).expect("the namespace has a name");
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).expect("root may enter");
    }

    /// Delays what each host sends, and loses a part of it; or why this kernel cannot.
    pub fn impair(&self, delay_ms: u32, loss_percent: u32) -> Result<(), String> {
        self.names.iter().try_for_each(|name| {
            let host = self.namespace(name);
            let netem = format!("delay {delay_ms}ms loss {loss_percent}%");
            run("tc", &format!("-n {host} qdisc add dev cable root netem {netem}"))
        })
    }

    /// Pulls a host's cable out, or plugs it in.
    pub fn plug(&self, host: &str, plugged: bool) {
        let state = if plugged { "up" } else { "down" };
        ip(&format!("-n {} link set {host} {state}", self.namespace("switch"))).expect("the switch has this port");
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.names.iter().chain(&["switch"]) {
            // One that was never made cannot be removed.
            let _ = ip(&format!("netns del {}", self.namespace(name)));
        }
    }
}

fn ip(line: &str) -> Result<(), String> {
    run("ip", line)
}

fn run(program: &str, line: &str) -> Result<(), String> {
    match Command::new(program).args(line.split(' ')).output() {
        Ok(Output { status, .. }) if status.success() => Ok(()),
        Ok(Output { stderr, .. }) => Err(format!("{program} {line}: {}", String::from_utf8_lossy(&stderr).trim())),
        Err(error) => Err(format!("{program}: {error}")),
    }
}
