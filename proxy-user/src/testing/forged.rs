//! Segments of clients who are not there.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use etherparse::PacketBuilder;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::namespace::Namespace;

/// Sends SYNs from a namespace, each from another address of 198.51.100.0/24, which nobody has.
///
/// # Panics
/// If they can't be sent.
pub fn flood(from: &Namespace, to: SocketAddrV4, count: u16) {
    let raw = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)));
    let socket = from.run(raw).expect("raw sockets need root");
    let place = SockAddr::from(SocketAddr::from(SocketAddrV4::new(*to.ip(), 0)));
    for number in 0..count {
        let [high, low] = number.to_be_bytes();
        let source = Ipv4Addr::new(198, 51, 100, low);
        let packet = PacketBuilder::ipv4(source.octets(), to.ip().octets(), 64)
            .tcp(20_000 + u16::from(high), to.port(), 1000, 512)
            .syn();
        let mut bytes = Vec::new();
        packet.write(&mut bytes, &[]).expect("it fits");
        socket.send_to(&bytes, &place).expect("a link");
    }
}
