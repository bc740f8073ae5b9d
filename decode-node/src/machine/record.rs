//! [`DecodeNode`] as it is recorded.

use super::{DecodeConfig, DecodeNode};
use ridge_protocol::record::Recordable;

impl Recordable for DecodeNode {
    const KIND: &'static str = "decode";
    type Config = DecodeConfig;

    fn build(config: DecodeConfig) -> Self {
        Self::new(config)
    }
}
