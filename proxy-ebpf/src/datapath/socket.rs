//! The node's own sockets: translated when they connect or send, before there is a packet.
//!
//! The kernel never sees the VIP, so established traffic costs nothing. What the socket asked for is
//! kept with it, or under its cookie, so that getpeername and recvmsg show the VIP.

use bytemuck::Zeroable;
use proxy_common::addr::{mix, spread};
use proxy_common::settings::Settings;
use proxy_common::tables::{
    AffinityKey, Algorithm, Asked, Kinds, PeerKey, PeerValue, ServiceKey, ServiceValue,
};
use proxy_common::{Address, Family, Outcome, Port, proto};

use super::choose::{self, Asker, Failure};
use super::{Service, Tables, catch};

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
    /// The cookie of the machine's first network namespace.
    fn initial_cookie(&self) -> u64;
    /// What it connected to when it last was led to a backend.
    fn asked(&self) -> Option<Asked<F>>;
    /// Keeps that with the socket. False if there is no memory for it.
    fn keep(&mut self, asked: &Asked<F>) -> bool;
    /// Whether a socket of the same network namespace is bound to the very address and port.
    fn is_bound(&self) -> bool;
}

/// What a socket does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    /// It connects. A datagram socket only notes where to send: that never fails, and is how programs find out by which
    /// address they would send.
    Connect,
    /// It sends to an address.
    Send,
}

/// connect or sendmsg to an address: led to a backend if the address is a Service's.
#[inline(always)]
pub fn send<F: Family, S: Socket<F>, T: Tables<F>>(
    socket: &mut S,
    tables: &T,
    act: Act,
) -> Outcome {
    let (address, port) = socket.address();
    if tables.interest(&address) == Kinds::NONE {
        return Outcome::NotService;
    }
    let failed = if act == Act::Connect && socket.protocol() == proto::UDP {
        Outcome::NotService
    } else {
        Outcome::SocketRefused
    };
    let cookie = socket.netns_cookie();
    let netns = halves(cookie);
    let is_node = match tables.setting(|s| &s.netns) {
        Settings::BY_COOKIE => netns == tables.setting(|s| &s.netns_cookie),
        Settings::INITIAL => cookie == socket.initial_cookie(),
        _ => false,
    };
    if !is_node && tables.setting(|s| &s.all_sockets) == 0 {
        return Outcome::NotService;
    }
    let Some(mark) = tables.service(&ServiceKey::mark(address)) else {
        return pass(socket, tables, act);
    };
    // Every namespace has a loopback of its own.
    if mark.has(ServiceValue::LOOPBACK) && !is_node {
        return Outcome::NotService;
    }
    let service = match choose::frontend(tables, &mark, address, port, socket.protocol()) {
        Ok(service) => service,
        // An endpoint may be at the node's own address.
        Err(Failure::NotService) => return pass(socket, tables, act),
        // A server's answer, to the VIP that stands in for its client.
        Err(_)
            if act == Act::Send && catch::stands_in(tables, (address, port), socket.protocol()) =>
        {
            return Outcome::NotService;
        }
        Err(_) => return failed,
    };
    if is_node && service.may_be_nodes(&mark) && socket.is_bound() {
        return Outcome::NotService;
    }
    match lead(socket, tables, &service, netns, act) {
        Ok(()) => Outcome::SocketTranslated,
        Err(Failure::NotService) => Outcome::NotService,
        Err(_) => failed,
    }
}

/// The address is no Service's. Who connects to an endpoint by its own address is not shown a VIP for it any more. Not who sends: the
/// kernel does so with the endpoint's address for a connected IPv6 socket that was led to an IPv4 one.
#[inline(always)]
fn pass<F: Family, S: Socket<F>, T: Tables<F>>(socket: &mut S, tables: &T, act: Act) -> Outcome {
    let (address, port) = socket.address();
    if act == Act::Connect && tables.is_server(&address, port) {
        forget(socket, tables);
    }
    Outcome::NotService
}

/// What comes from the endpoint that the socket is about to connect to is not the answer to what it asked by a VIP before.
#[inline(always)]
fn forget<F: Family, S: Socket<F>, T: Tables<F>>(socket: &mut S, tables: &T) {
    let (backend, port) = socket.address();
    if socket.asked().is_some() {
        socket.keep(&Asked::zeroed());
    }
    let key = PeerKey { cookie: halves(socket.cookie()), backend, port, pad: [0; 2] };
    if tables.peer(&key).is_some() {
        tables.forget_peer(&key);
    }
}

/// Leads the socket to a backend.
#[inline(always)]
fn lead<F: Family, S: Socket<F>, T: Tables<F>>(
    socket: &mut S,
    tables: &T,
    service: &Service,
    netns: [u32; 2],
    act: Act,
) -> Result<(), Failure> {
    let (vip, port) = socket.address();
    let is_tcp = socket.protocol() == proto::TCP;
    let steady = service.steady();
    // Each datagram of an unconnected socket asks anew, and stays with one backend.
    let service = if is_tcp { service } else { &steady };
    let [low, high] = halves(socket.cookie());
    let client = AffinityKey { client: Zeroable::zeroed(), service: service.id, netns };
    let asker = Asker { outside: false, allowed: service.has(ServiceValue::NODE_ALLOWED) };
    let draw = || {
        if service.chooses(Algorithm::RoundRobin) {
            return tables.turn(service.id);
        }
        let seed = tables.setting(|s| &s.seed);
        if service.chooses(Algorithm::SourceHash) {
            // All sockets of a network namespace are one client.
            return spread(mix(mix(seed, netns[0]), service.id));
        }
        spread(mix(mix(mix(vip.mix(seed), low), high), u32::from(port.word())))
    };
    let (_, backend) = choose::backend(tables, service, asker, &client, draw)?;
    let led = Asked { backend: backend.addr, vip, backend_port: backend.port, port };
    let is_kept = act == Act::Connect && socket.keep(&led);
    if !(is_kept && is_tcp) {
        remember(tables, [low, high], &led);
    }
    socket.set_address(backend.addr, backend.port);
    Ok(())
}

/// Notes what a socket asked for, unless that is known: most that send, send again.
#[inline(always)]
fn remember<F: Family, T: Tables<F>>(tables: &T, cookie: [u32; 2], asked: &Asked<F>) {
    let Asked { backend, vip, backend_port, port } = *asked;
    let key = PeerKey { cookie, backend, port: backend_port, pad: [0; 2] };
    let value = PeerValue { vip, port, pad: [0; 2] };
    if tables.peer(&key) != Some(value) {
        tables.remember_peer(&key, &value);
    }
}

/// What a socket is shown an address for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shown {
    /// getpeername: what it is connected to.
    Peer,
    /// recvmsg: whom a datagram comes from.
    Source,
}

/// recvmsg or getpeername: shows the VIP where the socket asked for one.
#[inline(always)]
pub fn restore<F: Family, S: Socket<F>, T: Tables<F>>(
    socket: &mut S,
    tables: &T,
    shown: Shown,
) -> Outcome {
    let (backend, port) = socket.address();
    if !tables.is_server(&backend, port) {
        return Outcome::NotService;
    }
    // A peer is what was connected to; a datagram's source may be what was asked since, by another VIP. Without an address in an
    // `Option`: the verifier of 5.10 sees it read where there is none.
    let is_shown = shown == Shown::Peer && show_asked(socket)
        || show_noted(socket, tables)
        || shown == Shown::Source && show_asked(socket);
    if is_shown { Outcome::SocketRestored } else { Outcome::NotService }
}

/// Shows what the socket connected to, if the backend that it is shown stands for that.
#[inline(always)]
fn show_asked<F: Family, S: Socket<F>>(socket: &mut S) -> bool {
    match socket.asked() {
        Some(asked) if (asked.backend, asked.backend_port) == socket.address() => {
            socket.set_address(asked.vip, asked.port);
            true
        }
        _ => false,
    }
}

/// Shows what is noted of the socket and the backend that it is shown.
#[inline(always)]
fn show_noted<F: Family, S: Socket<F>, T: Tables<F>>(socket: &mut S, tables: &T) -> bool {
    let (backend, port) = socket.address();
    let key = PeerKey { cookie: halves(socket.cookie()), backend, port, pad: [0; 2] };
    match tables.peer(&key) {
        Some(PeerValue { vip, port, .. }) => {
            socket.set_address(vip, port);
            true
        }
        None => false,
    }
}

#[inline(always)]
fn halves(cookie: u64) -> [u32; 2] {
    [cookie as u32, (cookie >> 32) as u32]
}
