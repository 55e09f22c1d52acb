//! What the bench's programs in the kernel and their loader share. Never shipped.

use crate::map_type;

map_type! {
    /// A packet that each run begins with, of one flow after the other.
    pub struct Template {
        /// The packet.
        pub bytes: [u8; 128],
        /// The number of the first flow.
        pub first: u32,
        /// How many flows there are.
        pub flows: u32,
        /// How far the flows of two runs are from each other.
        pub step: u32,
        /// Where the client's address has two bytes that the flow's number changes.
        pub address: u32,
        /// Where the client's port is.
        pub port: u32,
    }
}

map_type! {
    /// A flow of the floor program, or a Service without its client. All in network byte order.
    pub struct FloorKey {
        /// The client's address.
        pub src: [u16; 2],
        /// The address that is asked.
        pub dst: [u16; 2],
        /// The client's port.
        pub sport: u16,
        /// The port that is asked.
        pub dport: u16,
        /// The transport protocol.
        pub proto: u32,
    }
}

map_type! {
    /// Where it leads. In network byte order.
    pub struct FloorValue {
        /// The backend's address.
        pub address: [u16; 2],
        /// The backend's port.
        pub port: u16,
        /// Zero.
        pub pad: u16,
    }
}
