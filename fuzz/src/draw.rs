//! Values drawn from a fuzzer's bytes: what a machine hears from its peers is a program that these bytes spell.

/// A cursor over the bytes; when they are used up it draws zeros.
#[derive(Clone, Debug)]
pub struct Draw<'a>(&'a [u8]);

impl<'a> Draw<'a> {
    /// Draws from `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Nothing is left.
    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// A number below `bound`, which is from 1 to 256.
    pub fn below(&mut self, bound: u32) -> u32 {
        u32::from(self.byte()) % bound
    }

    /// True for one byte in `count`.
    pub fn one_in(&mut self, count: u32) -> bool {
        self.below(count) == 0
    }

    /// True for every other byte.
    pub fn coin(&mut self) -> bool {
        self.one_in(2)
    }

    /// Mostly a small number, and now and then one at an edge of its type.
    pub fn number(&mut self) -> u32 {
        match self.byte() {
            0xff => u32::MAX,
            0xfe => u32::MAX - 1,
            0xfd => 1 << 31,
            0xfc => 1 << 16,
            small => u32::from(small % 64),
        }
    }

    /// As [`number`](Self::number), with 64 bits.
    pub fn wide(&mut self) -> u64 {
        match self.number() {
            u32::MAX => u64::MAX,
            number => number.into(),
        }
    }

    /// A float: an ordinary one, or one that arithmetic does not expect.
    pub fn float(&mut self) -> f32 {
        match self.byte() {
            0xff => f32::NAN,
            0xfe => f32::INFINITY,
            0xfd => f32::NEG_INFINITY,
            0xfc => f32::MAX,
            0xfb => -1.0,
            other => f32::from(other % 16) / 4.0,
        }
    }

    /// The next `len` bytes, or as many as are left.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }
}
