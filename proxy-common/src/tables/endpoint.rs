//! Which addresses may be endpoints', in few bits: whoever asks them by their own addresses is known to need a second look.

use crate::addr::{Address, spread};
use crate::map_type;

map_type! {
    /// Part of the bits: one for each place that a hash of an address may have. Those of endpoints of before stay set.
    pub struct Bits {
        /// The bits.
        pub words: [u32; 2],
    }
}

/// Where an address has its bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The element of the map.
    pub element: u32,
    /// The word of the element.
    pub word: usize,
    /// The word with that bit set alone.
    pub mask: u32,
}

impl Bits {
    /// How many elements there are.
    pub const COUNT: usize = 8_192;

    /// Where an address has its bit.
    #[inline(always)]
    pub fn place(address: &impl Address) -> Place {
        let hash = spread(address.mix(0));
        Place {
            // The lowest 13 bits, as there are elements.
            element: hash & 0x1fff,
            word: (hash >> 18) as usize & 1,
            mask: 1 << (hash >> 13 & 31),
        }
    }
}
