//! Which clients have shown that their address is their own, and how many ask at once.

use crate::map_type;

map_type! {
    /// A connection whose client has answered a challenge.
    pub struct Verified {
        /// When he has, in ticks.
        pub since: u32,
    }
}

map_type! {
    /// How many TCP flows have begun in a tick, as one CPU has seen them come in by uplinks.
    pub struct Arrivals {
        /// The tick.
        pub tick: u32,
        /// How many.
        pub count: u32,
    }
}

impl Arrivals {
    /// With one more in that tick.
    #[inline(always)]
    #[must_use]
    pub const fn one_more(self, tick: u32) -> Self {
        let before = if self.tick == tick { self.count } else { 0 };
        Self { tick, count: before.saturating_add(1) }
    }
}
