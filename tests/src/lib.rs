//! Support for tests that look at Ridge from outside: running clusters, plain HTTP, metrics, and the source tree.
//!
//! What [`cluster`] knows of a cluster is what a user can see; `ridge-sim` joins the machines alone, without their
//! shells. End-to-end tests themselves are in `cluster/tests`, where cargo tells them the path of the binary. Read
//! [`cluster::Cluster`] for those, and [`tidy`] for the walls between crates.

#![forbid(unsafe_code)]

pub mod cluster;
pub mod http;
pub mod metrics;
pub mod model;
pub mod netns;
pub mod process;
pub mod roles;
pub mod tidy;
