//! [`Router`] as it is recorded.

use super::{Router, RouterConfig};
use ridge_protocol::record::Recordable;

impl Recordable for Router {
    const KIND: &'static str = "router";
    /// The second is the number of its first request.
    type Config = (RouterConfig, u64);

    fn build((config, first_request): (RouterConfig, u64)) -> Self {
        Self::new(config, first_request)
    }
}
