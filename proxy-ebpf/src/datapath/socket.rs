//! The node's own sockets: translated when they connect or send, before there is a packet.
//!
//! The kernel never sees the VIP, so established traffic costs nothing. What the socket asked for is
//! kept under its cookie, so that getpeername and recvmsg show the VIP.

use proxy_common::addr::mix;
use proxy_common::tables::{PeerKey, PeerValue, ServiceKey};
use proxy_common::{Address, Family, Outcome, Port};

use super::{Tables, open};

/// The address in a socket call, and who makes it.
pub trait Socket<F: Family> {
    /// The address and port: the destination, or on the way back the peer.
    fn address(&self) -> (F::Addr, Port);
    /// Replaces the address and port.
    fn set_address(&mut self, address: F::Addr, port: Port);
    /// The socket's protocol number.
    fn protocol(&self) -> u8;
    /// The socket's cookie, unique while the machine runs.
    fn cookie(&self) -> u64;
    /// The cookie of the socket's network namespace.
    fn netns_cookie(&self) -> u64;
}

/// connect or sendmsg to an address: led to a backend if the address is a Service's.
#[inline(always)]
pub fn send<F: Family, S: Socket<F>, T: Tables<F>>(socket: &mut S, tables: &T) -> Outcome {
    let wanted = tables.setting(|s| &s.netns_cookie);
    if wanted != [0; 2] && halves(socket.netns_cookie()) != wanted {
        return Outcome::NotService;
    }
    let (vip, port) = socket.address();
    if tables.service(&ServiceKey::vip(vip)).is_none() {
        return Outcome::NotService;
    }
    let cookie = socket.cookie();
    let Some(service) = tables.service(&ServiceKey::new(vip, port, socket.protocol())) else {
        return Outcome::SocketRefused;
    };
    // By the socket and not at random: an unconnected socket's datagrams stay with one backend.
    let [low, high] = halves(cookie);
    let hash = mix(mix(mix(tables.setting(|s| &s.seed), low), high), u32::from(port.word()));
    let hash = mix(vip.mix(hash), service.id);
    let Some((_, backend)) = open::select(service, hash, tables) else {
        return Outcome::SocketRefused;
    };
    let key =
        PeerKey { cookie: [low, high], backend: backend.addr, port: backend.port, pad: [0; 2] };
    tables.remember_peer(&key, &PeerValue { vip, port, pad: [0; 2] });
    socket.set_address(backend.addr, backend.port);
    Outcome::SocketTranslated
}

/// recvmsg or getpeername: shows the VIP where the socket asked for one.
#[inline(always)]
pub fn restore<F: Family, S: Socket<F>, T: Tables<F>>(socket: &mut S, tables: &T) -> Outcome {
    let (backend, port) = socket.address();
    let key = PeerKey { cookie: halves(socket.cookie()), backend, port, pad: [0; 2] };
    match tables.peer(&key) {
        Some(PeerValue { vip, port, .. }) => {
            socket.set_address(vip, port);
            Outcome::SocketRestored
        }
        None => Outcome::NotService,
    }
}

#[inline(always)]
fn halves(cookie: u64) -> [u32; 2] {
    [cookie as u32, (cookie >> 32) as u32]
}
