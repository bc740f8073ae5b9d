//! The bytes that each token stands for, in one table, and the alphabet that byte-level BPE hides bytes in.

/// Token id to bytes, without a string per token.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl Pieces {
    /// Appends the bytes of the next id.
    pub(crate) fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        // A vocabulary comes from a file of bounded size; 4 GiB of token text is beyond any limit on it.
        self.ends.push(u32::try_from(self.bytes.len()).unwrap_or(u32::MAX));
    }

    /// The bytes of `id`; empty for an id that is not in the vocabulary.
    pub(crate) fn piece(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        self.bytes.get(start as usize..end as usize).unwrap_or(&[])
    }

    /// Ids in the table.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }
}

/// The byte that a character of GPT-2's byte alphabet stands for.
///
/// Printable bytes stand for themselves; the other 68 were given the characters from U+0100 on, in order.
pub(crate) fn byte_of_char(c: char) -> Option<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        // 0x00..=0x20, then 0x7f..=0xa0, then 0xad.
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The bytes of a byte-level token. One with a character outside the alphabet, as added tokens have, is plain text.
pub(crate) fn bytes_of_byte_level(token: &str) -> Vec<u8> {
    token.chars().map(byte_of_char).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte of a token spelled `<0x0A>`, as SentencePiece spells byte fallback.
pub(crate) fn byte_of_fallback(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut seen = [0; 256];
        for code in 0..0x400 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of_char) {
                seen[byte as usize] += 1;
            }
        }
        assert_eq!(seen, [1; 256]);
        assert_eq!(bytes_of_byte_level("ĠHello"), b" Hello");
        assert_eq!(bytes_of_byte_level("<｜x｜>"), "<｜x｜>".as_bytes());
    }

    #[test]
    fn fallback_bytes() {
        assert_eq!(byte_of_fallback("<0x0A>"), Some(10));
        assert_eq!(byte_of_fallback("<0xAG>"), None);
        assert_eq!(byte_of_fallback("<0x+1>"), None);
        assert_eq!(byte_of_fallback("<s>"), None);
    }

    #[test]
    fn table() {
        let mut pieces = Pieces::default();
        pieces.push(b"ab");
        pieces.push(b"");
        pieces.push(b"c");
        assert_eq!(
            (pieces.piece(0), pieces.piece(1), pieces.piece(2), pieces.piece(3)),
            (&b"ab"[..], &b""[..], &b"c"[..], &b""[..])
        );
    }
}
