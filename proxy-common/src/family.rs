//! The two address families, and the little in which they differ.
//!
//! Code is written once over [`Family`] and instantiated twice. What needs a packet header's shape
//! is in `proxy-ebpf`'s `packet` module; nothing else knows which family it runs for.

use core::fmt::Debug;
use core::hash::Hash;

use crate::addr::{Addr4, Addr6, Address};
use crate::proto;

/// An address family: [`V4`] or [`V6`], and no other type.
pub trait Family: sealed::Sealed + Copy + Eq + Ord + Hash + Debug + 'static {
    /// An address of the family, in network byte order.
    type Addr: Address;
    /// The family's `EtherType` (host byte order).
    const ETHERTYPE: u16;
    /// The protocol number of the family's ICMP.
    const ICMP: u8;
    /// The length of an address in bits.
    const BITS: u8;
    /// The suffix of the family's map names.
    const SUFFIX: &'static str;
}

/// IPv4 (RFC 791).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct V4;

/// IPv6 (RFC 8200).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct V6;

impl Family for V4 {
    type Addr = Addr4;
    const ETHERTYPE: u16 = 0x0800;
    const ICMP: u8 = proto::ICMP;
    const BITS: u8 = 32;
    const SUFFIX: &'static str = "v4";
}

impl Family for V6 {
    type Addr = Addr6;
    const ETHERTYPE: u16 = 0x86dd;
    const ICMP: u8 = proto::ICMPV6;
    const BITS: u8 = 128;
    const SUFFIX: &'static str = "v6";
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::V4 {}
    impl Sealed for super::V6 {}
}
