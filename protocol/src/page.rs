//! The frame of one KV page on a unidirectional QUIC stream: a fixed header, then the page's bytes.
//!
//! KV bytes never pass through an encoder: the header is fixed-size little-endian, the page is raw memory
//! (protocol rules K-1 to K-4).

use crate::ids::RequestId;
use crate::limits;
use twox_hash::XxHash3_128;

/// Bytes of an encoded [`PageHeader`].
pub const PAGE_HEADER_BYTES: usize = 48;
const MAGIC: [u8; 4] = *b"RKVP";

/// What stands before every page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageHeader {
    /// The transfer it belongs to.
    pub request: RequestId,
    /// Layer, from 0.
    pub layer: u32,
    /// Index of the block within the sequence, from 0.
    pub index: u32,
    /// Bytes that follow.
    pub len: u32,
    /// [`page_digest`] of the bytes that follow.
    pub digest: u128,
}

/// Why a header was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PageHeaderError {
    /// The first four bytes are not `RKVP`.
    #[error("page frame does not start with RKVP")]
    Magic,
    /// The peer speaks another version.
    #[error("page frame has protocol version {0}, this node speaks {ours}", ours = limits::PROTOCOL_VERSION)]
    Version(u16),
    /// The length is zero or above the limit.
    #[error("page of {0} bytes is outside 1..={max}", max = limits::MAX_PAGE_BYTES)]
    Length(u32),
    /// A reserved byte is not zero.
    #[error("reserved bytes of a page frame are not zero")]
    Reserved,
}

impl PageHeader {
    /// Writes the header: magic 4, version 2, reserved 2, request 8, layer 4, index 4, len 4, reserved 4, digest 16.
    pub fn encode(&self) -> [u8; PAGE_HEADER_BYTES] {
        let mut out = [0; PAGE_HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&limits::PROTOCOL_VERSION.to_le_bytes());
        out[8..16].copy_from_slice(&self.request.0.to_le_bytes());
        out[16..20].copy_from_slice(&self.layer.to_le_bytes());
        out[20..24].copy_from_slice(&self.index.to_le_bytes());
        out[24..28].copy_from_slice(&self.len.to_le_bytes());
        out[32..48].copy_from_slice(&self.digest.to_le_bytes());
        out
    }

    /// Reads a header; every byte string yields a header or an error.
    pub fn decode(bytes: &[u8; PAGE_HEADER_BYTES]) -> Result<Self, PageHeaderError> {
        fn u32_at(bytes: &[u8; PAGE_HEADER_BYTES], at: usize) -> u32 {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        }
        if bytes[0..4] != MAGIC {
            return Err(PageHeaderError::Magic);
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != limits::PROTOCOL_VERSION {
            return Err(PageHeaderError::Version(version));
        }
        if bytes[6..8] != [0; 2] || bytes[28..32] != [0; 4] {
            return Err(PageHeaderError::Reserved);
        }
        let len = u32_at(bytes, 24);
        if len == 0 || len as usize > limits::MAX_PAGE_BYTES {
            return Err(PageHeaderError::Length(len));
        }
        let mut request = [0; 8];
        request.copy_from_slice(&bytes[8..16]);
        let mut digest = [0; 16];
        digest.copy_from_slice(&bytes[32..48]);
        Ok(Self {
            request: RequestId(u64::from_le_bytes(request)),
            layer: u32_at(bytes, 16),
            index: u32_at(bytes, 20),
            len,
            digest: u128::from_le_bytes(digest),
        })
    }
}

/// Digest of a page, computed where it was produced and checked where it landed.
///
/// XXH3-128, seeded with request, layer and index so that a page in the wrong place does not verify. It guards
/// against our own mistakes and failing memory; against an adversary on the wire there is TLS.
pub fn page_digest(request: RequestId, layer: u32, index: u32, page: &[u8]) -> u128 {
    seeded_digest(page_seed(request, layer, index), page)
}

/// The seed of a page's digest.
pub fn page_seed(request: RequestId, layer: u32, index: u32) -> u64 {
    request.0 ^ (u64::from(layer) << 40) ^ (u64::from(index) << 8) ^ 0x5249_4447
}

/// The digest of a page, by its seed.
pub fn seeded_digest(seed: u64, page: &[u8]) -> u128 {
    XxHash3_128::oneshot_with_seed(seed, page)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> PageHeader {
        PageHeader { request: RequestId(7), layer: 3, index: 9, len: 4096, digest: 0x1234_5678_9abc_def0 << 32 }
    }

    #[test]
    fn header_round_trips() {
        assert_eq!(PageHeader::decode(&header().encode()), Ok(header()));
    }

    #[test]
    fn bad_headers_are_refused() {
        let with = |at: usize, value: u8| {
            let mut bytes = header().encode();
            bytes[at] = value;
            PageHeader::decode(&bytes)
        };
        assert_eq!(with(0, b'X'), Err(PageHeaderError::Magic));
        assert_eq!(with(4, 9), Err(PageHeaderError::Version(9)));
        assert_eq!(with(6, 1), Err(PageHeaderError::Reserved));
        assert_eq!(with(30, 1), Err(PageHeaderError::Reserved));
        assert!(matches!(with(27, 0xff), Err(PageHeaderError::Length(_))));
    }

    #[test]
    fn digest_depends_on_place_and_content() {
        let base = page_digest(RequestId(1), 2, 3, b"page");
        assert_ne!(base, page_digest(RequestId(2), 2, 3, b"page"));
        assert_ne!(base, page_digest(RequestId(1), 3, 3, b"page"));
        assert_ne!(base, page_digest(RequestId(1), 2, 4, b"page"));
        assert_ne!(base, page_digest(RequestId(1), 2, 3, b"pagf"));
    }
}
