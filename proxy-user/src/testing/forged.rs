//! Packets of clients who are not there.

use std::net::SocketAddr;

use proxy_common::tables::Side;
use proxy_common::testing::Packet;
use socket2::{Domain, Protocol, Socket, Type};

use super::namespace::Namespace;

/// A socket that sends IPv4 packets with any source.
pub struct Forger(Socket);

impl Forger {
    /// One in a namespace.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn new(namespace: &Namespace) -> Self {
        let raw = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)));
        Self(namespace.run(raw).expect("raw sockets need root"))
    }

    /// Sends a packet, without its link-layer header.
    ///
    /// # Panics
    /// If the kernel refuses, but for want of room, which comes.
    pub fn send(&self, packet: &Packet) {
        let to = SocketAddr::new(packet.dst.ip(), 0);
        while let Err(error) = self.0.send_to(&packet.frame()[14..], &to.into()) {
            assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS), "{error}");
        }
    }

    /// Sends the SYN of a client that there is not, another one for each number.
    pub fn syn(&self, number: u32, to: SocketAddr) {
        let [_, a, b, c] = number.to_be_bytes();
        let source = SocketAddr::from(([198, 18 + a, b, c], 40_000));
        self.send(&Packet::tcp(Side::Ingress, source, to, 2));
    }
}
