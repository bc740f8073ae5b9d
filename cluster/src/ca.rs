//! `cluster ca`: certificates by hand, for clusters of several machines. `up --local` issues its own.

use crate::cli::{CaArgs, CaCommand, RoleName};
use crate::dirs;
use anyhow::Context;
use ridge_kvtransfer::shell::ca::ClusterCa;
use ridge_protocol::{NodeName, Role};
use std::path::Path;

/// Runs the command.
pub fn run(args: CaArgs) -> anyhow::Result<()> {
    let folder = match args.ca_dir {
        Some(folder) => folder,
        None => dirs::data()?.join("ca"),
    };
    let ca =
        ClusterCa::load_or_create(&folder).with_context(|| format!("cannot open the CA in {}", folder.display()))?;
    match args.command {
        CaCommand::Init => println!("the cluster's CA is in {}; keep its key to yourself", folder.display()),
        CaCommand::Issue { name, role, out } => {
            let role = match role {
                RoleName::Router => Role::Router,
                RoleName::Prefill => Role::Prefill,
                RoleName::Decode => Role::Decode,
            };
            issue(&ca, &name, role, &out)?;
            println!("wrote ca.pem, node.pem and node.key of {name} ({role}) to {}", out.display());
        }
    }
    Ok(())
}

/// Writes what a node needs into `folder`: its certificate, its key, and whom it trusts.
pub fn issue(ca: &ClusterCa, name: &str, role: Role, folder: &Path) -> anyhow::Result<()> {
    dirs::create_private(folder)?;
    let path = folder.join("ca.pem");
    std::fs::write(&path, ca.cert_pem()).with_context(|| format!("cannot write {}", path.display()))?;
    let issued = ca.issue(&NodeName(name.to_owned()), role).and_then(|cert| cert.write(folder));
    issued.with_context(|| format!("cannot issue a certificate for {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_node_gets_three_files_and_a_private_key() {
        let folder = tempfile::tempdir().expect("a temp dir");
        let ca = ClusterCa::load_or_create(&folder.path().join("ca")).expect("creates");
        let node = folder.path().join("decode-0");
        issue(&ca, "decode-0", Role::Decode, &node).expect("issues");
        for file in ["ca.pem", "node.pem", "node.key"] {
            assert!(node.join(file).is_file(), "{file}");
        }
        let mode = std::fs::metadata(node.join("node.key")).expect("is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(issue(&ca, "../evil", Role::Decode, &node).is_err());
    }
}
