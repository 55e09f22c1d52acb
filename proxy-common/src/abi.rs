//! The contract's number.

/// Raised with every change of a type in [`crate::tables`] or of its meaning.
///
/// It is written into the pinned `config` map. An agent that finds another number there does not
/// reuse the pinned maps.
pub const ABI: u32 = 7;

/// The catch-all link's address, which is the same on every node: packets that are let in there carry it. Locally administered.
pub const CATCH_ALL_MAC: [u8; 6] = *b"\x02ptl0\0";
