//! The hash chain that names the content of full blocks.
//!
//! The hash of block *i* covers the hash of block *i − 1* and the block's tokens, so it commits to everything from
//! the start of the sequence. The root covers the tenant's salt and the block size: different tenants share nothing.

use ridge_protocol::{BlockHash, TokenId};

/// Hashes a sequence block by block as it grows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HashChain {
    block_size: usize,
    last: BlockHash,
    hashed_tokens: usize,
}

impl HashChain {
    /// A chain for an empty sequence.
    pub fn new(salt: u64, block_size: usize) -> Self {
        assert!(block_size > 0, "blocks hold at least one token");
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"ridge block chain v1");
        hasher.update(&salt.to_le_bytes());
        hasher.update(&(block_size as u64).to_le_bytes());
        Self { block_size, last: truncate(&hasher), hashed_tokens: 0 }
    }

    /// Hashes of the blocks that became full since the last call. `tokens` is the whole sequence.
    pub fn extend(&mut self, tokens: &[TokenId]) -> Vec<BlockHash> {
        assert!(tokens.len() >= self.hashed_tokens, "a sequence never shrinks");
        let mut out = Vec::new();
        while self.hashed_tokens + self.block_size <= tokens.len() {
            let block = &tokens[self.hashed_tokens..self.hashed_tokens + self.block_size];
            let mut hasher = blake3::Hasher::new();
            hasher.update(&self.last.0);
            for token in block {
                hasher.update(&token.to_le_bytes());
            }
            self.last = truncate(&hasher);
            self.hashed_tokens += self.block_size;
            out.push(self.last);
        }
        out
    }
}

/// Hashes of all full blocks of a sequence.
pub fn hash_blocks(salt: u64, block_size: usize, tokens: &[TokenId]) -> Vec<BlockHash> {
    HashChain::new(salt, block_size).extend(tokens)
}

fn truncate(hasher: &blake3::Hasher) -> BlockHash {
    let mut out = [0; 16];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    BlockHash(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_full_blocks_are_hashed() {
        assert_eq!(hash_blocks(0, 4, &[1, 2, 3]).len(), 0);
        assert_eq!(hash_blocks(0, 4, &[1, 2, 3, 4]).len(), 1);
        assert_eq!(hash_blocks(0, 4, &[1, 2, 3, 4, 5]).len(), 1);
    }

    #[test]
    fn a_hash_commits_to_everything_before_it() {
        let a = hash_blocks(0, 2, &[1, 2, 3, 4]);
        let b = hash_blocks(0, 2, &[9, 2, 3, 4]);
        assert_ne!(a[0], b[0]);
        assert_ne!(a[1], b[1]);
        assert_eq!(a[0], hash_blocks(0, 2, &[1, 2, 7, 7])[0]);
    }

    #[test]
    fn salt_and_block_size_separate() {
        assert_ne!(hash_blocks(0, 2, &[1, 2]), hash_blocks(1, 2, &[1, 2]));
        assert_ne!(hash_blocks(0, 1, &[1])[0], hash_blocks(0, 2, &[1, 1])[0]);
    }

    #[test]
    fn growing_equals_hashing_at_once() {
        let tokens: Vec<TokenId> = (0..37).collect();
        let mut chain = HashChain::new(5, 4);
        let mut grown = Vec::new();
        for end in 0..=tokens.len() {
            grown.extend(chain.extend(&tokens[..end]));
        }
        assert_eq!(grown, hash_blocks(5, 4, &tokens));
    }
}
