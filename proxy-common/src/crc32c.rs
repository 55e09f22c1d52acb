//! The change of SCTP's checksum (RFC 9260, appendix A) when its ports change, without a look at the
//! rest of the packet.
//!
//! `CRC32c` is linear: of two packets that differ in their first four bytes, the checksums differ by
//! the checksum of that difference followed by zeros. To append `n` zero bits to what a checksum covers
//! is to multiply it by `x^n`, modulo the polynomial.

/// The polynomial, bits reflected: the highest bit stands for `x^0`.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// `x^1`.
const X: u32 = 1 << 30;

/// How many bits a length has.
const LENGTH_BITS: usize = 16;
/// How many half bytes a checksum has.
const NIBBLES: usize = 8;

/// What a half byte of a checksum becomes when `2^n` zero bytes are appended: by `n`, by the half byte's
/// place and by its value. Eight look-ups for each `n` instead of 32 steps: the kernel's verifier
/// walks through all of them.
static APPENDED: [[[u32; 16]; NIBBLES]; LENGTH_BITS] = appended();

const fn appended() -> [[[u32; 16]; NIBBLES]; LENGTH_BITS] {
    // x^8, for one byte.
    let mut power = X;
    let mut doubled = 0;
    while doubled < 3 {
        power = multiply(power, power);
        doubled += 1;
    }
    let mut tables = [[[0; 16]; NIBBLES]; LENGTH_BITS];
    let mut bit = 0;
    while bit < LENGTH_BITS {
        tables[bit] = multiples(power);
        power = multiply(power, power);
        bit += 1;
    }
    tables
}

/// The products of a factor with each half byte at each place.
const fn multiples(factor: u32) -> [[u32; 16]; NIBBLES] {
    let mut table = [[0; 16]; NIBBLES];
    let mut place = 0;
    while place < NIBBLES {
        let mut value = 0;
        while value < 16 {
            table[place][value as usize] = multiply(factor, value << (4 * place));
            value += 1;
        }
        place += 1;
    }
    table
}

/// The product of two polynomials.
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 0;
    while bit < 32 {
        if a >> (31 - bit) & 1 == 1 {
            product ^= b;
        }
        b = if b & 1 == 1 { (b >> 1) ^ POLYNOMIAL } else { b >> 1 };
        bit += 1;
    }
    product
}

/// What to xor into the checksum of a packet of `length` bytes, of which the first four change by
/// `difference` (old xor new). Both are read as little-endian numbers, as the checksum lies in packets.
#[inline(always)]
pub fn difference(difference: u32, length: u16) -> u32 {
    let mut sum = difference;
    for (bit, tables) in APPENDED.iter().enumerate() {
        let mut grown = 0;
        for (place, table) in tables.iter().enumerate() {
            grown ^= table[(sum >> (4 * place)) as usize & 15];
        }
        // Unknown to the compiler, which would make a branch of it.
        let wanted = 0_u32.wrapping_sub(core::hint::black_box(u32::from(length >> bit) & 1));
        sum = (grown & wanted) | (sum & !wanted);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);

    proptest! {
        #[test]
        fn a_difference_equals_recomputation(
            mut bytes in proptest::collection::vec(any::<u8>(), 12..3000),
            ports in any::<[u8; 4]>(),
        ) {
            let before = CRC.checksum(&bytes);
            let old = u32::from_le_bytes(bytes[..4].try_into().unwrap());
            bytes[..4].copy_from_slice(&ports);
            let changed = old ^ u32::from_le_bytes(ports);
            let length = u16::try_from(bytes.len()).unwrap();
            prop_assert_eq!(before ^ difference(changed, length), CRC.checksum(&bytes));
        }
    }
}
