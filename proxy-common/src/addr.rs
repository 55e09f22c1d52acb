//! Addresses and ports as they lie in packets and maps: network byte order, in named bytes, so that
//! `bpftool` prints `[10, 96, 0, 1]` and `[0, 80]`.

use core::fmt::{self, Debug, Display};
use core::hash::Hash;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};

use crate::checksum::Delta;

/// What both kinds of address can do.
pub trait Address: Pod + Eq + Ord + Hash + Debug + Display + Into<IpAddr> {
    /// The change of a checksum over this address when `new` takes its place.
    fn delta(self, new: Self) -> Delta;
    /// Folds the address into a hash.
    fn mix(self, hash: u32) -> u32;
    /// Two numbers that tell it from all others of its family.
    fn halves(self) -> [u64; 2];
}

/// An IPv4 address. Aligned to 4 so that it is copied and compared as one word.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C, align(4))]
pub struct Addr4 {
    /// The address in network byte order.
    pub octets: [u8; 4],
}

/// An IPv6 address. Aligned to 4, which packets and maps can always give it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C, align(4))]
pub struct Addr6 {
    /// The address in network byte order.
    pub octets: [u8; 16],
}

/// A transport port in network byte order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
#[repr(C, align(2))]
pub struct Port {
    /// The port, most significant byte first.
    pub octets: [u8; 2],
}

impl Addr4 {
    #[inline(always)]
    const fn word(self) -> u32 {
        u32::from_ne_bytes(self.octets)
    }
}

impl Addr6 {
    #[inline(always)]
    fn words(self) -> [u32; 4] {
        bytemuck::cast(self)
    }
}

impl Address for Addr4 {
    #[inline(always)]
    fn delta(self, new: Self) -> Delta {
        Delta::default().word(self.word(), new.word())
    }

    #[inline(always)]
    fn mix(self, hash: u32) -> u32 {
        mix(hash, self.word())
    }

    #[inline(always)]
    fn halves(self) -> [u64; 2] {
        [self.word().into(), 0]
    }
}

impl Address for Addr6 {
    #[inline(always)]
    fn delta(self, new: Self) -> Delta {
        let (old, new) = (self.words(), new.words());
        Delta::default()
            .word(old[0], new[0])
            .word(old[1], new[1])
            .word(old[2], new[2])
            .word(old[3], new[3])
    }

    #[inline(always)]
    fn mix(self, hash: u32) -> u32 {
        let words = self.words();
        mix(mix(mix(mix(hash, words[0]), words[1]), words[2]), words[3])
    }

    #[inline(always)]
    fn halves(self) -> [u64; 2] {
        let [a, b, c, d] = self.words().map(u64::from);
        [a | b << 32, c | d << 32]
    }
}

impl Port {
    /// A port from its number.
    #[inline(always)]
    pub const fn new(number: u16) -> Self {
        Self { octets: number.to_be_bytes() }
    }

    /// The port's number.
    #[inline(always)]
    pub const fn number(self) -> u16 {
        u16::from_be_bytes(self.octets)
    }

    /// The two bytes as they lie in memory, for checksums and hashes.
    #[inline(always)]
    pub const fn word(self) -> u16 {
        u16::from_ne_bytes(self.octets)
    }
}

/// One round of the hash that flow keys use: a multiplication spreads, a shift brings the high bits
/// down. Cheap enough for every packet; [`spread`] is the final avalanche.
#[inline(always)]
pub const fn mix(hash: u32, word: u32) -> u32 {
    let hash = (hash ^ word).wrapping_mul(0x9e37_79b1);
    hash ^ (hash >> 15)
}

/// The last step of `MurmurHash3`: every input bit reaches every output bit.
#[inline(always)]
pub const fn spread(hash: u32) -> u32 {
    let hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    let hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

impl From<Ipv4Addr> for Addr4 {
    fn from(address: Ipv4Addr) -> Self {
        Self { octets: address.octets() }
    }
}

impl From<Ipv6Addr> for Addr6 {
    fn from(address: Ipv6Addr) -> Self {
        Self { octets: address.octets() }
    }
}

impl From<Addr4> for IpAddr {
    fn from(address: Addr4) -> Self {
        Self::V4(address.octets.into())
    }
}

impl From<Addr6> for IpAddr {
    fn from(address: Addr6) -> Self {
        Self::V6(address.octets.into())
    }
}

macro_rules! shown_as_ip {
    ($($address:ident),+) => {$(
        impl Display for $address {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                Display::fmt(&IpAddr::from(*self), f)
            }
        }
        impl Debug for $address {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                Display::fmt(self, f)
            }
        }
    )+};
}
shown_as_ip!(Addr4, Addr6);

impl Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Display::fmt(&self.number(), f)
    }
}

impl Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Display::fmt(self, f)
    }
}
