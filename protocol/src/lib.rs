//! What two Ridge processes must agree on.
//!
//! Ids, virtual time, the [`Machine`] contract, the batch plan that a scheduler hands to an engine, the wire
//! messages and their framing. This crate is the leaf of the workspace: it imports no other Ridge crate, opens no
//! socket and reads no clock.
//!
//! Read [`Machine`] first, then [`wire`].

#![forbid(unsafe_code)]

pub mod ids;
pub mod limits;
pub mod machine;
pub mod model;
pub mod pace;
pub mod page;
pub mod plan;
pub mod record;
pub mod sampling;
pub mod stats;
pub mod step;
pub mod time;
pub mod transfer;
pub mod wire;

pub use ids::{BlockHash, BlockId, NodeId, NodeName, RequestId, Role, TokenId};
pub use machine::Machine;
pub use model::{BlockShape, CacheDtype, Conversion, KV_LAYOUT, ModelIdentity};
pub use plan::{BatchPlan, NoToken, PlanItem, Reader, SampleSpec, TokenOut};
pub use sampling::{Grammar, GrammarKind, SamplingParams};
pub use step::Step;
pub use time::{Duration, Instant};
