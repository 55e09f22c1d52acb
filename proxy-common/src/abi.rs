//! The contract's number.

/// Raised with every change of a type in [`crate::tables`] or of its meaning.
///
/// It is written into the pinned `config` map. An agent that finds another number there does not
/// reuse the pinned maps.
pub const ABI: u32 = 5;
