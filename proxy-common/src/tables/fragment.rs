//! Fragments: the ports of a datagram, for those of its fragments that carry none.

use crate::addr::Port;
use crate::map_type;

map_type! {
    /// A datagram on its way, as RFC 791 and RFC 8200 identify it.
    pub struct FragmentKey<F> {
        /// Source address.
        pub src: F::Addr,
        /// Destination address.
        pub dst: F::Addr,
        /// The header's identification, as it lies in memory; IPv4's 16 bits are widened.
        pub id: u32,
        /// Transport protocol.
        pub proto: u8,
        /// The side at which the fragments are seen.
        pub side: u8,
        /// Zero.
        pub pad: [u8; 2],
    }
}

map_type! {
    /// The ports that the first fragment carried, before translation.
    pub struct FragmentValue {
        /// Source port.
        pub sport: Port,
        /// Destination port.
        pub dport: Port,
    }
}
