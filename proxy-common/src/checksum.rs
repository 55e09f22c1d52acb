//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! **Byte order.** The sum of 16-bit words is the same in any byte order, up to a swap of the result's
//! bytes: the carry out of the high byte comes back in at the low one. So words are added just as they
//! lie in memory, in the host's order, and the result is stored just as it comes. Nothing in this
//! module swaps bytes, and nothing that calls it may.
//!
//! **Increments.** A [`Delta`] is the one's complement sum of `!old + new` over the words that changed.
//! It can be added to a checksum ([`Delta::apply`]), to another delta, or handed to the kernel's
//! `bpf_l4_csum_replace` as its `to` argument. Equation 3 of RFC 1624 is used, which never turns a
//! checksum of a valid packet into the wrong zero.

use core::ops::Add;

/// A change of a checksum: a one's complement sum of 32-bit words, not yet folded. Halves of such a word may be
/// added apart or together: folding adds them up.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[must_use]
pub struct Delta {
    sum: u64,
}

impl Delta {
    /// Takes the 16-bit word `old` out of the sum and puts `new` in.
    #[inline(always)]
    pub const fn half(self, old: u16, new: u16) -> Self {
        Self { sum: self.sum + (!old) as u64 + new as u64 }
    }

    /// Takes the 32-bit word `old` out of the sum and puts `new` in.
    #[inline(always)]
    pub const fn word(self, old: u32, new: u32) -> Self {
        Self { sum: self.sum + (!old) as u64 + new as u64 }
    }

    /// The sum of its 16-bit words: 0 or 0xffff if it changes nothing. `bpf_l4_csum_replace` takes it as it is.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the carry has been added in")]
    pub const fn fold(self) -> u16 {
        let sum = (self.sum & 0xffff_ffff) + (self.sum >> 32);
        let sum = (sum & 0xffff) + (sum >> 16);
        // At most 0x1_fffe: the carry makes no other one.
        (sum + (sum >> 16)) as u16
    }

    /// The same change, folded: what it is applied to several times need not fold it again.
    #[inline(always)]
    pub const fn folded(self) -> Self {
        Self { sum: self.fold() as u64 }
    }

    /// The checksum `check` after this change.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the carry has been added in")]
    pub const fn apply(self, check: u16) -> u16 {
        let sum = (!check) as u32 + self.fold() as u32;
        !((sum + (sum >> 16)) as u16)
    }
}

/// Deltas of at most a few dozen words are added: 2 times 2^32 each, far from overflow.
impl Add for Delta {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self { sum: self.sum + other.sum }
    }
}

/// The sum of the 16-bit words of `bytes`, not folded. An odd last byte is padded with zero.
///
/// For at most 64 KiB: above that the 32-bit sum could overflow.
pub fn sum(bytes: &[u8]) -> u32 {
    let mut pairs = bytes.chunks_exact(2);
    let words: u32 = pairs.by_ref().map(|p| u32::from(u16::from_ne_bytes([p[0], p[1]]))).sum();
    match pairs.remainder() {
        [last] => words + u32::from(u16::from_ne_bytes([*last, 0])),
        _ => words,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Folds a sum of 16-bit words, carries added back in.
    fn fold(sum: u32) -> u16 {
        let sum = (sum & 0xffff) + (sum >> 16);
        u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap()
    }

    fn checksum(bytes: &[u8]) -> u16 {
        !fold(sum(bytes))
    }

    #[test]
    fn the_example_of_rfc_1071_gives_its_published_sum() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)).to_ne_bytes(), [0xdd, 0xf2]);
    }

    proptest! {
        #[test]
        fn an_increment_equals_recomputation(
            mut bytes in proptest::collection::vec(any::<u8>(), 64),
            at in 0usize..31,
            new in any::<u16>(),
        ) {
            // The headers that Portal changes are never all zero, where the sum has two zeros.
            bytes[63] = 1;
            let old = u16::from_ne_bytes([bytes[2 * at], bytes[2 * at + 1]]);
            let before = checksum(&bytes);
            bytes[2 * at..2 * at + 2].copy_from_slice(&new.to_ne_bytes());
            prop_assert_eq!(Delta::default().half(old, new).apply(before), checksum(&bytes));
        }
    }
}
