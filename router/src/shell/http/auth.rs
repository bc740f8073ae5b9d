//! API keys. Each key is a tenant: prompts sent under different keys share nothing in the prefix cache, so nobody
//! can learn from an answer's speed what somebody else has asked.

use axum::http::{HeaderMap, header};
use std::fmt;
use subtle::ConstantTimeEq;

/// The keys that are let in. None at all lets everybody in.
pub(super) struct Keys(Vec<(String, Tenant)>);

/// Whose request it is, as far as the prefix cache is concerned.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct Tenant(u64);

impl Keys {
    /// Derives each key's tenant.
    pub(super) fn new(keys: &[String]) -> Self {
        Self(keys.iter().map(|key| (key.clone(), Tenant(hash(0, key)))).collect())
    }

    /// Whose request this is, or `None` if it may not come in. Takes the same time whichever key it is: every key is
    /// compared, and each in time that depends on its length only.
    pub(super) fn check(&self, headers: &HeaderMap) -> Option<Tenant> {
        if self.0.is_empty() {
            return Some(Tenant::default());
        }
        let given = bearer(headers).unwrap_or_default();
        let mut tenant = None;
        for (key, owner) in &self.0 {
            if bool::from(key.as_bytes().ct_eq(given)) {
                tenant = Some(*owner);
            }
        }
        tenant
    }
}

impl Tenant {
    /// The salt of the request's prefix hashes. `cache_salt` parts a tenant's own users from each other.
    pub(super) fn salt(self, cache_salt: Option<&str>) -> u64 {
        cache_salt.map_or(self.0, |salt| hash(self.0, salt))
    }
}

impl fmt::Debug for Keys {
    /// Says how many there are and nothing more.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}

fn hash(base: u64, text: &str) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("ridge prefix cache salt");
    hasher.update(&base.to_le_bytes()).update(text.as_bytes());
    let digest = hasher.finalize();
    u64::from_le_bytes(digest.as_bytes()[..8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_tenants() {
        let keys = Keys::new(&["alpha".into(), "beta".into()]);
        let check = |value: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            keys.check(&headers)
        };
        let alpha = check(Some("Bearer alpha")).unwrap();
        let beta = check(Some("bearer beta")).unwrap();
        assert_ne!(alpha.salt(None), beta.salt(None));
        assert_ne!(alpha.salt(None), alpha.salt(Some("x")));
        assert_ne!(alpha.salt(Some("x")), beta.salt(Some("x")));
        for wrong in
            [None, Some("Bearer "), Some("Bearer alph"), Some("Bearer alphaa"), Some("Basic alpha"), Some("alpha")]
        {
            assert_eq!(check(wrong), None, "{wrong:?}");
        }
        assert_eq!(Keys::new(&[]).check(&HeaderMap::new()), Some(Tenant::default()));
    }
}
