//! Which address of the node takes the place of another one that leaves by a link.

use crate::{Family, map_type};

map_type! {
    /// Toward whom packets leave: what the trie's prefix counts the bits of.
    pub struct ExitData<F> {
        /// The link's index, in network byte order: it is matched bit by bit.
        pub link: [u8; 4],
        /// IPv4: the gateway, or without one the destination, as the kernel's own MASQUERADE has it. IPv6: the destination
        /// (RFC 6724).
        pub toward: F::Addr,
    }
}

map_type! {
    /// A key of the exits, laid out as the kernel's tries have it.
    pub struct ExitKey<F> {
        /// How many bits of what follows count.
        pub prefix: u32,
        /// What follows.
        pub data: ExitData<F>,
    }
}

impl<F: Family> ExitKey<F> {
    /// The bits of the link, which every prefix counts.
    pub const LINK_BITS: u32 = 32;

    /// Toward the range of that many bits that an address is in, by a link.
    #[inline(always)]
    pub const fn new(link: u32, toward: F::Addr, bits: u32) -> Self {
        let data = ExitData { link: link.to_be_bytes(), toward };
        Self { prefix: Self::LINK_BITS + bits, data }
    }
}

map_type! {
    /// An address of the node.
    pub struct Exit<F> {
        /// The address.
        pub address: F::Addr,
    }
}
