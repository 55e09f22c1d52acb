//! Socket peers: which VIP a socket asked for, so that it can be shown as its peer.
//!
//! A socket that connects has that with it, and takes it along when it is gone. One that sends here and there has a record for each
//! backend, in a table of those that were used last; so has a datagram socket that connects, for the agent to find.

use crate::addr::Port;
use crate::map_type;

map_type! {
    /// A socket and a backend it was sent to.
    pub struct PeerKey<F> {
        /// The socket's cookie in two halves, low first: a `u64` would ask for padding after an
        /// IPv6 address.
        pub cookie: [u32; 2],
        /// The backend's address.
        pub backend: F::Addr,
        /// The backend's port.
        pub port: Port,
        /// Zero.
        pub pad: [u8; 2],
    }
}

map_type! {
    /// What a socket connected to, and where it was led.
    pub struct Asked<F> {
        /// The backend's address; zeros, and port 0, if it was led nowhere since it connected otherwise.
        pub backend: F::Addr,
        /// The virtual IP.
        pub vip: F::Addr,
        /// The backend's port.
        pub backend_port: Port,
        /// The Service's port.
        pub port: Port,
    }
}

map_type! {
    /// The frontend that the socket asked for.
    pub struct PeerValue<F> {
        /// The virtual IP.
        pub vip: F::Addr,
        /// The Service's port.
        pub port: Port,
        /// Zero.
        pub pad: [u8; 2],
    }
}
