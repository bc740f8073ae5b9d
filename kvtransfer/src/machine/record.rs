//! [`Sender`] and [`Receiver`] as they are recorded.

use super::{Receiver, ReceiverConfig, Sender, SenderConfig};
use ridge_protocol::record::Recordable;

impl Recordable for Sender {
    const KIND: &'static str = "sender";
    type Config = SenderConfig;

    fn build(config: SenderConfig) -> Self {
        Self::new(config)
    }
}

impl Recordable for Receiver {
    const KIND: &'static str = "receiver";
    type Config = ReceiverConfig;

    fn build(config: ReceiverConfig) -> Self {
        Self::new(config)
    }
}
