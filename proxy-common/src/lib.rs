//! The contract: everything that Portal's kernel programs and its agent must agree on.
//!
//! Reading order: [`family`] (what differs between IPv4 and IPv6), [`addr`] (addresses and ports as
//! they lie in packets and maps), [`tables`] (the layout of every map), [`outcome`] (every way a
//! packet can leave), [`checksum`] and [`crc32c`] (their arithmetic) and [`abi`] (the contract's number).
//!
//! Rules of this crate: `no_std`; map types hold integers and byte arrays only, have no padding
//! (proven by [`layout`] at compile time), and show as named fields in `bpftool map dump`.
#![cfg_attr(not(any(test, feature = "testing")), no_std)]

pub mod abi;
pub mod addr;
pub mod bench;
pub mod checksum;
pub mod crc32c;
pub mod family;
pub mod layout;
pub mod outcome;
pub mod proto;
pub mod settings;
pub mod siphash;
pub mod tables;
#[cfg(feature = "testing")]
pub mod testing;

pub use addr::{Addr4, Addr6, Address, Port};
pub use family::{Family, V4, V6};
pub use outcome::Outcome;
