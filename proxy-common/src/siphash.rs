//! SipHash-1-3 (Aumasson and Bernstein, 2012) of some words: a hash that nobody can foretell who does not have its key, however
//! many results he sees. [`crate::addr::mix`] is cheaper, and no secret of its own.

/// The hash of `words`, each eight bytes with the lowest first.
#[inline(always)]
pub const fn siphash<const N: usize>([low, high]: [u64; 2], words: [u64; N]) -> u64 {
    let mut state = [
        low ^ 0x736f_6d65_7073_6575,
        high ^ 0x646f_7261_6e64_6f6d,
        low ^ 0x6c79_6765_6e65_7261,
        high ^ 0x7465_6462_7974_6573,
    ];
    let mut position = 0;
    while position < N {
        state = absorb(state, words[position]);
        position += 1;
    }
    state = absorb(state, (N as u64 * 8) << 56);
    state[2] ^= 0xff;
    let [a, b, c, d] = round(round(round(state)));
    a ^ b ^ c ^ d
}

#[inline(always)]
const fn absorb([a, b, c, d]: [u64; 4], word: u64) -> [u64; 4] {
    let [a, b, c, d] = round([a, b, c, d ^ word]);
    [a ^ word, b, c, d]
}

#[inline(always)]
const fn round([mut a, mut b, mut c, mut d]: [u64; 4]) -> [u64; 4] {
    a = a.wrapping_add(b);
    b = b.rotate_left(13) ^ a;
    a = a.rotate_left(32);
    c = c.wrapping_add(d);
    d = d.rotate_left(16) ^ c;
    a = a.wrapping_add(d);
    d = d.rotate_left(21) ^ a;
    c = c.wrapping_add(b);
    b = b.rotate_left(17) ^ c;
    c = c.rotate_left(32);
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use std::hash::Hasher;

    use proptest::prelude::*;
    use siphasher::sip::SipHasher13;

    use super::siphash;

    proptest! {
        #[test]
        fn is_what_others_call_by_that_name(key: [u64; 2], words: [u64; 5]) {
            let mut theirs = SipHasher13::new_with_keys(key[0], key[1]);
            words.iter().for_each(|word| theirs.write(&word.to_le_bytes()));
            prop_assert_eq!(siphash(key, words), theirs.finish());
        }
    }
}
