//! [`PrefillNode`] as it is recorded.

use super::{PrefillConfig, PrefillNode};
use ridge_protocol::record::Recordable;

impl Recordable for PrefillNode {
    const KIND: &'static str = "prefill";
    type Config = PrefillConfig;

    fn build(config: PrefillConfig) -> Self {
        Self::new(config)
    }
}
