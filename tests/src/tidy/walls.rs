//! Who may import whom: the table "Walls" of ARCHITECTURE.md.

use super::{Tree, code_only};

/// Ridge crates that a crate may name outside its dev-dependencies. A crate that is not listed may import anything.
const MAY_IMPORT: [(&str, &[&str]); 11] = [
    ("protocol", &[]),
    ("kernels", &[]),
    ("blocks", &["ridge-protocol"]),
    ("model", &["ridge-protocol", "ridge-kernels"]),
    ("kvtransfer", &["ridge-protocol"]),
    ("router", &["ridge-protocol", "ridge-blocks", "ridge-model", "ridge-kvtransfer"]),
    ("prefill-node", &["ridge-protocol", "ridge-blocks", "ridge-model", "ridge-kvtransfer"]),
    ("decode-node", &["ridge-protocol", "ridge-blocks", "ridge-model", "ridge-kvtransfer"]),
    ("sim", &["ridge-protocol", "ridge-router", "ridge-prefill-node", "ridge-decode-node", "ridge-kvtransfer"]),
    ("tests", &[]),
    (
        "fuzz",
        &[
            "ridge-protocol",
            "ridge-kernels",
            "ridge-model",
            "ridge-kvtransfer",
            "ridge-router",
            "ridge-prefill-node",
            "ridge-decode-node",
        ],
    ),
];
/// Crates that hold a machine: whatever does I/O there must be optional, so that the machine builds alone.
const WITH_MACHINE: [&str; 4] = ["router", "prefill-node", "decode-node", "kvtransfer"];
/// What belongs to shells.
const SHELL_ONLY: [&str; 12] = [
    "tokio",
    "quinn",
    "quinn-proto",
    "rustls",
    "axum",
    "hyper",
    "hyper-util",
    "tower",
    "tower-http",
    "socket2",
    "ridge-model",
    "ridge-kernels",
];
/// The simulator: as pure as a machine, but it may name them all.
const SIMULATOR: &str = "sim/src/";
/// The machines' crates, which the simulator imports without their shells.
const ROLES: [&str; 4] = ["ridge_router", "ridge_prefill_node", "ridge_decode_node", "ridge_kvtransfer"];
/// Paths that no machine names.
const NOT_IN_MACHINES: [&str; 16] = [
    "tokio",
    "quinn",
    "quinn_proto",
    "axum",
    "hyper",
    "rustls",
    "socket2",
    "rand",
    "ridge_model",
    "ridge_kernels",
    "ridge_router",
    "ridge_prefill_node",
    "ridge_decode_node",
    "ridge_cluster",
    "std::thread",
    "crate::shell",
];

/// A dependency as a manifest names it.
struct Dependency<'a> {
    section: &'a str,
    name: &'a str,
    line: &'a str,
}

fn dependencies(manifest: &str) -> Vec<Dependency<'_>> {
    let mut section = "";
    let mut found = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[') {
            section = header.trim_end_matches(']');
        } else if section.ends_with("dependencies") && !line.is_empty() && !line.starts_with('#') {
            let end = line.find(['.', '=', ' ']).unwrap_or(line.len());
            found.push(Dependency { section, name: &line[..end], line });
        }
    }
    found
}

/// Manifests: imports between crates, optional I/O beside machines, anyhow in the command only.
pub fn manifests(tree: &Tree) -> Vec<String> {
    let mut complaints = Vec::new();
    for member in tree.members() {
        let path = format!("{member}/Cargo.toml");
        let Some(manifest) = tree.files.get(&path) else {
            complaints.push(format!("{path} is missing"));
            continue;
        };
        let allowed = MAY_IMPORT.iter().find(|(name, _)| *name == member).map(|(_, allowed)| *allowed);
        for Dependency { section, name, line } in dependencies(manifest) {
            if section == "dev-dependencies" {
                continue;
            }
            if name.starts_with("ridge-") && allowed.is_some_and(|allowed| !allowed.contains(&name)) {
                complaints.push(format!("{path}: {member} must not import {name}"));
            }
            let optional = line.contains("optional = true");
            if WITH_MACHINE.contains(&member.as_str()) && SHELL_ONLY.contains(&name) && !optional {
                complaints.push(format!("{path}: {name} must be optional, or the machine cannot be built alone"));
            }
            if member == "sim" && (line.contains("features") || SHELL_ONLY.contains(&name)) {
                complaints.push(format!("{path}: {name} brings a shell into the simulator"));
            }
            if name == "anyhow" && member != "cluster" {
                complaints.push(format!("{path}: anyhow is for the command; a library names its errors"));
            }
        }
    }
    complaints
}

/// Machine modules and the simulator: no I/O, clock, thread, outside chance or model; and machines name no other role.
pub fn machines(tree: &Tree) -> Vec<String> {
    let is_machine = |path: &str| {
        path.starts_with(SIMULATOR)
            || WITH_MACHINE.iter().any(|member| {
                path.strip_prefix(member)
                    .and_then(|rest| rest.strip_prefix("/src/machine"))
                    .is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
            })
    };
    let mut complaints = Vec::new();
    for (path, text) in tree.rust().filter(|(path, _)| is_machine(path)) {
        let own = format!("ridge_{}", path.split('/').next().unwrap_or_default().replace('-', "_"));
        let code: String = code_only(text);
        let allowed = |name: &str| name == own || path.starts_with(SIMULATOR) && ROLES.contains(&name);
        for banned in NOT_IN_MACHINES.iter().filter(|banned| !allowed(banned) && names(&code, banned)) {
            complaints.push(format!("{path}: a machine must not name {banned}"));
        }
        for (module, allowed) in [("std::net", &["SocketAddr", "IpAddr"][..]), ("std::time", &["Duration"][..])] {
            for item in items_of(&code, module).iter().filter(|item| !allowed.contains(&item.as_str())) {
                complaints.push(format!("{path}: a machine must not name {module}::{item}"));
            }
        }
        for unordered in ["HashMap", "HashSet"].iter().filter(|name| code.contains(**name)) {
            complaints.push(format!("{path}: a machine must not depend on hash order ({unordered})"));
        }
        // Machine time has no now(): whoever calls one has a clock.
        for clock in ["Instant::now", "SystemTime"] {
            if code.contains(clock) {
                complaints.push(format!("{path}: a machine must not read a clock ({clock})"));
            }
        }
    }
    complaints
}

/// Whether `code` names the crate or path: followed by `::`, `;` or ` as`, and not the tail of a longer word.
fn names(code: &str, wanted: &str) -> bool {
    code.match_indices(wanted).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = &code[at + wanted.len()..];
        let starts = !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':');
        starts && (after.starts_with("::") || after.starts_with(';') || after.starts_with(" as "))
    })
}

/// What is used of a module: `m::A` and `m::{A, B}` alike, `*` for the module as a whole.
fn items_of(code: &str, module: &str) -> Vec<String> {
    let mut items = Vec::new();
    for (at, _) in code.match_indices(module) {
        let rest = &code[at + module.len()..];
        let Some(rest) = rest.strip_prefix("::") else {
            if !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_') {
                items.push("*".to_owned());
            }
            continue;
        };
        let list = match rest.strip_prefix('{') {
            Some(list) => list.split_once('}').map_or(list, |(list, _)| list),
            None => {
                let word = |c: char| c.is_alphanumeric() || c == '_' || c == '*';
                &rest[..rest.find(|c| !word(c)).unwrap_or(rest.len())]
            }
        };
        let first_word = |item: &str| item.split_whitespace().next().unwrap_or_default().to_owned();
        items.extend(list.split(',').map(first_word).filter(|item| !item.is_empty()));
    }
    items
}

/// The wire has one encoder.
pub fn bincode(tree: &Tree) -> Vec<String> {
    let sources = tree.rust().filter(|(path, _)| !path.starts_with("protocol/") && !path.starts_with("fuzz/"));
    let named = sources.filter(|(_, text)| names(&code_only(text), "bincode")).map(|(path, _)| path.to_owned());
    let members = tree.members().into_iter().filter(|member| member != "protocol");
    let imported = members.map(|member| format!("{member}/Cargo.toml")).filter(|path| {
        let manifest = tree.files.get(path).map_or("", String::as_str);
        dependencies(manifest).iter().any(|dependency| dependency.name == "bincode")
    });
    named.chain(imported).map(|path| format!("{path}: bincode is protocol's alone")).collect()
}

/// The map shows every room.
pub fn architecture_lists_every_crate(tree: &Tree) -> Vec<String> {
    let Some(text) = tree.files.get("ARCHITECTURE.md") else { return vec!["ARCHITECTURE.md is missing".into()] };
    let missing = tree.members().into_iter().filter(|member| !text.contains(&format!("{member}/")));
    missing.map(|member| format!("ARCHITECTURE.md does not list {member}/")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKSPACE: &str = "members = [\"protocol\", \"router\", \"model\", \"cluster\"]";

    fn manifest_complaints(member: &str, manifest: &str) -> usize {
        let path = format!("{member}/Cargo.toml");
        let tree = Tree::of(&[("Cargo.toml", &format!("members = [\"{member}\"]")), (&path, manifest)]);
        manifests(&tree).len()
    }

    #[test]
    fn forbidden_imports_are_found() {
        assert_eq!(manifest_complaints("protocol", "[dependencies]\nridge-blocks.workspace = true\n"), 1);
        assert_eq!(manifest_complaints("kernels", "[dependencies]\nridge-protocol = { path = \"x\" }\n"), 1);
        assert_eq!(manifest_complaints("model", "[dependencies]\nridge-kvtransfer.workspace = true\n"), 1);
        assert_eq!(manifest_complaints("model", "[dependencies]\nridge-kernels.workspace = true\n"), 0);
        assert_eq!(manifest_complaints("model", "[dev-dependencies]\nridge-kvtransfer.workspace = true\n"), 0);
        assert_eq!(manifest_complaints("router", "[target.'cfg(unix)'.dependencies]\nridge-cluster = \"1\"\n"), 1);
        assert_eq!(manifest_complaints("router", "[dependencies]\ntokio.workspace = true\n"), 1);
        assert_eq!(manifest_complaints("router", "[dependencies]\ntokio = { workspace = true, optional = true }\n"), 0);
        assert_eq!(manifest_complaints("blocks", "[dependencies]\nanyhow.workspace = true\n"), 1);
        assert_eq!(manifest_complaints("cluster", "[dependencies]\nanyhow.workspace = true\n"), 0);
        assert_eq!(manifest_complaints("sim", "[dependencies]\nridge-router.workspace = true\n"), 0);
        assert_eq!(manifest_complaints("fuzz", "[dependencies]\nridge-router.workspace = true\n"), 0);
        assert_eq!(manifest_complaints("fuzz", "[dependencies]\nridge-cluster = { path = \"x\" }\n"), 1);
        assert_eq!(manifest_complaints("sim", "[dependencies]\nridge-model.workspace = true\n"), 2);
        let shell = "[dependencies]\nridge-router = { workspace = true, features = [\"shell\"] }\n";
        assert_eq!(manifest_complaints("sim", shell), 1);
        assert_eq!(manifests(&Tree::of(&[("Cargo.toml", WORKSPACE)])).len(), 4, "manifests are missing");
    }

    fn machine_complaints(text: &str) -> Vec<String> {
        machines(&Tree::of(&[("router/src/machine/mod.rs", text)]))
    }

    #[test]
    fn machines_stay_pure() {
        let bad = [
            "use tokio::sync::mpsc;",
            "use quinn::Endpoint;",
            "fn f() { std::thread::spawn(|| ()); }",
            "use std::time::Instant;",
            "use std::time::{Duration, SystemTime};",
            "use std::net::TcpStream;",
            "use std::net::{SocketAddr, UdpSocket};",
            "use std::net;",
            "let x = rand::random();",
            "use ridge_model::engine::Engine;",
            "use ridge_decode_node::machine::DecodeConfig;",
            "use crate::shell::gateway;",
            "let t = Instant::now();",
            "use std::collections::HashMap;",
        ];
        for text in bad {
            assert!(!machine_complaints(text).is_empty(), "{text}");
        }
        let good = [
            "use std::net::SocketAddr;",
            "use std::time::Duration;",
            "use ridge_protocol::{Duration, Instant};",
            "// tokio::spawn would need a clock",
            "fn operand() {} let operand = operand::new();",
            "use ridge_router::machine::types;",
        ];
        for text in good {
            assert_eq!(machine_complaints(text), [""; 0], "{text}");
        }
        let simulator = |text: &str| machines(&Tree::of(&[("sim/src/run.rs", text)])).len();
        assert_eq!(simulator("use ridge_decode_node::machine::DecodeNode;"), 0);
        assert_eq!(simulator("use ridge_model::engine::Engine;"), 1);
        assert_eq!(simulator("use std::collections::HashMap;"), 1);
        assert_eq!(simulator("let t = std::time::Instant::now();"), 2, "a clock, by both of its names");
        // Shells may do what machines may not, whatever their folder is called.
        assert!(machines(&Tree::of(&[("router/src/shell/machinery.rs", "use tokio::time;")])).is_empty());
        assert!(!machines(&Tree::of(&[("kvtransfer/src/machine.rs", "use tokio::time;")])).is_empty());
    }

    #[test]
    fn bincode_stays_in_protocol() {
        let tree = Tree::of(&[
            ("Cargo.toml", WORKSPACE),
            ("protocol/src/wire.rs", "bincode::encode()"),
            ("router/src/lib.rs", "bincode::encode()"),
            ("model/Cargo.toml", "[dependencies]\nbincode.workspace = true\n"),
            ("cluster/src/main.rs", "// bincode::encode()"),
        ]);
        assert_eq!(bincode(&tree).len(), 2);
    }

    #[test]
    fn an_unlisted_crate_is_found() {
        let listed = Tree::of(&[("Cargo.toml", WORKSPACE), ("ARCHITECTURE.md", "protocol/ router/ model/")]);
        assert_eq!(architecture_lists_every_crate(&listed), ["ARCHITECTURE.md does not list cluster/"]);
        assert_eq!(architecture_lists_every_crate(&Tree::default()), ["ARCHITECTURE.md is missing"]);
    }
}
