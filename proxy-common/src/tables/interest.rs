//! Which addresses are of interest, in few bits: most packets are nobody's whom the datapath knows, and one look here
//! tells. A bit stands for all addresses with the same hash: one that is set says no more than "look", one that is not set
//! says that there is nothing. Bits are never taken back: flows outlive their Services and endpoints.

use super::service::{ServiceKey, ServiceValue};
use crate::addr::{Address, Port, mix, spread};
use crate::{Family, map_type, proto};

map_type! {
    /// The bits of some hashes: for each [`Kind`] a word.
    pub struct Interest {
        /// The words, by [`Kind`].
        pub words: [u32; Kind::COUNT],
    }
}

/// What an address is of interest for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u32)]
pub enum Kind {
    /// It is a frontend's.
    Frontend = 0,
    /// It is the node's own.
    Node = 1,
    /// It is an endpoint's.
    Endpoint = 2,
    /// With a port: an endpoint serves there.
    Server = 3,
}

impl Kind {
    /// How many there are.
    pub const COUNT: usize = 4;
}

impl<F: Family> ServiceKey<F> {
    /// What a frontend, or a mark with these flags, makes its address of interest for. `None` if it is one at any address of the node's
    /// ([`ServiceKey::node_port`]): then its port is.
    pub fn interest(&self, flags: u32) -> Option<Kind> {
        let nodes = ServiceValue::NODE | ServiceValue::LOOPBACK;
        match self.proto {
            _ if self.vip == bytemuck::Zeroable::zeroed() => None,
            proto::ANY if flags & nodes != 0 => Some(Kind::Node),
            _ => Some(Kind::Frontend),
        }
    }
}

/// What an address may be, of what there is to be.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Kinds(u32);

impl Kinds {
    /// Nothing.
    pub const NONE: Self = Self(0);

    /// That and what it is already.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, kind: Kind) -> Self {
        Self(self.0 | 1 << kind as u32)
    }

    /// That no longer.
    #[inline(always)]
    #[must_use]
    pub const fn without(self, kind: Kind) -> Self {
        Self(self.0 & !(1 << kind as u32))
    }

    /// Whether it may be that.
    #[inline(always)]
    pub const fn has(self, kind: Kind) -> bool {
        self.0 & 1 << kind as u32 != 0
    }
}

/// Where an address has its bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spot {
    /// The element of the map.
    pub element: u32,
    /// Which bit of its words.
    pub bit: u32,
}

impl Spot {
    /// An address's.
    #[inline(always)]
    pub fn of(address: &impl Address) -> Self {
        Self::at(spread(address.mix(0)))
    }

    /// An address's with a port.
    #[inline(always)]
    pub fn of_server(address: &impl Address, port: Port) -> Self {
        Self::at(spread(mix(address.mix(0), u32::from(port.word()))))
    }

    #[inline(always)]
    const fn at(hash: u32) -> Self {
        Self { element: hash & ((1 << Interest::BITS) - 1), bit: hash >> 27 }
    }
}

impl Interest {
    /// How many bits of a hash an element's number has.
    const BITS: u32 = 16;
    /// How many elements there are: two million bits of each kind.
    pub const COUNT: usize = 1 << Self::BITS;

    /// What the bits of one spot say of an address; of its ports they say nothing.
    #[inline(always)]
    pub const fn kinds(&self, bit: u32) -> Kinds {
        let [frontend, node, endpoint, _] = self.words;
        // Without a branch.
        Kinds(frontend >> bit & 1 | (node >> bit & 1) << 1 | (endpoint >> bit & 1) << 2)
    }
}

map_type! {
    /// What two ports of the node's, next to each other, are of interest for: 1 if they are, else 0. First the even one.
    pub struct Ports {
        /// A flow was given them to which answers come in (masqueraded and hairpin flows), or is known by them as its client's.
        /// The datapath writes these.
        pub taken: [u32; 2],
        /// They have been a `NodePort`'s or a host port's. The agent writes these.
        pub served: [u32; 2],
    }
}

impl Ports {
    /// How many elements there are.
    pub const COUNT: usize = 1 << 15;

    /// The first of the words that the agent writes.
    pub const SERVED: usize = 2;

    /// Where a port is: the element, and which of its two.
    #[inline(always)]
    pub const fn place(port: Port) -> (u32, usize) {
        let number = port.number();
        (number as u32 / 2, number as usize % 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Addr4;

    #[test]
    fn neighbours_have_spots_of_their_own() {
        let spots = (0..=255_u8).map(|last| Spot::of(&Addr4 { octets: [10, 96, 0, last] }));
        let different: std::collections::BTreeSet<_> =
            spots.map(|spot| (spot.element, spot.bit)).collect();
        assert_eq!(different.len(), 256);
    }

    #[test]
    fn a_server_is_known_by_its_port() {
        let address = Addr4 { octets: [10, 244, 0, 7] };
        let at = |port| Spot::of_server(&address, Port::new(port));
        assert_ne!(at(80), at(81));
        assert_eq!(at(80), at(80));
    }

    #[test]
    fn kinds_say_what_was_put_in() {
        let spot = Interest { words: [0b10, 0, 0b11, 0b111] };
        let kinds = spot.kinds(1);
        assert!(kinds.has(Kind::Frontend) && !kinds.has(Kind::Node) && kinds.has(Kind::Endpoint));
        assert_eq!(Kinds::NONE.with(Kind::Frontend).with(Kind::Endpoint), kinds);
        assert_eq!(kinds.without(Kind::Endpoint), Kinds::NONE.with(Kind::Frontend));
        assert_eq!(spot.kinds(2), Kinds::NONE);
    }
}
