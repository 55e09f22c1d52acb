//! Sockets of the node that are connected to a backend which serves no more, by UDP. The kernel asks for no address when they
//! send, so they would send there for ever. Their next call fails, and they connect anew, to another backend (KP-110).

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result};
use aya::maps::{HashMap as HashTable, Map, MapData};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use proxy_common::tables::{PeerKey, PeerValue, ServiceKey, ServiceValue};
use proxy_common::{Family, V4, V6, proto};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_DUMP};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;

use super::ask::Asker;
use super::name_of;
use super::sys::for_each;
use super::writer::open;

/// `SOCK_DESTROY`: ends a socket, so that its next call fails (Linux 4.5, `CONFIG_INET_DIAG_DESTROY`).
const DESTROY: u16 = 21;

/// Backends that serve no more, whose sockets are to be ended. That needs nothing of the agent, and so can be done on a thread of
/// its own.
pub struct Abandoned {
    /// The folder of the pinned maps.
    pub maps: PathBuf,
    /// The backends, with the numbers of the Service ports that they have left.
    pub backends: HashSet<(SocketAddr, u32)>,
}

impl Abandoned {
    /// Ends the sockets of this network namespace that were led to these backends. How many there were.
    ///
    /// # Errors
    /// If the maps can't be read, or the kernel does not list its sockets or end them.
    pub fn run(self) -> Result<usize> {
        let mut led = HashMap::new();
        self.note_led::<V4>(&mut led)?;
        self.note_led::<V6>(&mut led)?;
        if led.is_empty() {
            return Ok(0);
        }
        let asker = Asker::open(NETLINK_SOCK_DIAG).context("cannot ask for sockets by netlink")?;
        let mut ended = 0;
        for family in [AF_INET, AF_INET6] {
            for socket in list(&asker, family).context("the kernel does not list its sockets")? {
                let to = SocketAddr::new(canonical(&socket), socket.destination_port);
                let backends = led.get(&u64::from_ne_bytes(socket.cookie));
                if backends.is_some_and(|backends: &HashSet<SocketAddr>| backends.contains(&to)) {
                    end(&asker, family, socket).context("the kernel does not end a socket")?;
                    ended += 1;
                }
            }
        }
        Ok(ended)
    }

    /// The sockets that were led to these backends, by their cookies.
    fn note_led<F: Family>(&self, led: &mut HashMap<u64, HashSet<SocketAddr>>) -> Result<()> {
        let addresses: HashSet<SocketAddr> = self.backends.iter().map(|(at, _)| *at).collect();
        let map = Map::HashMap(open(&self.maps, &name_of::<F>("services"))?);
        let services: HashTable<_, ServiceKey<F>, ServiceValue> = HashTable::try_from(map)?;
        let map = MapData::from_pin(self.maps.join(name_of::<F>("peers")))?;
        for_each(map.fd(), |key: &PeerKey<F>, value: &PeerValue<F>| {
            let backend = SocketAddr::new(key.backend.into(), key.port.number());
            if addresses.contains(&backend) && self.is_left(&services, backend, value) {
                let [low, high] = key.cookie.map(u64::from);
                led.entry(high << 32 | low).or_default().insert(backend);
            }
        })
        .context("cannot read the sockets that were led to backends")
    }

    /// Whether the backend has left the Service port that a socket asked for, which may be gone. Other Services may have the same
    /// backend, and the same Service port may have another number now.
    fn is_left<F: Family>(
        &self,
        services: &HashTable<MapData, ServiceKey<F>, ServiceValue>,
        backend: SocketAddr,
        asked: &PeerValue<F>,
    ) -> bool {
        let keys = [
            ServiceKey::new(asked.vip, asked.port, proto::UDP),
            ServiceKey::node_port(asked.port, proto::UDP),
        ];
        let service = keys.into_iter().find_map(|key| services.get(&key, 0).ok());
        service.is_none_or(|service| self.backends.contains(&(backend, service.id)))
    }
}

/// The UDP sockets of a family that are connected.
fn list(asker: &Asker, family: u8) -> io::Result<Vec<SocketId>> {
    let socket_id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    let all = asker.ask(request(family, socket_id), NLM_F_DUMP, None)?;
    let sockets = all.into_iter().filter_map(|message| match message {
        SockDiagMessage::InetResponse(response) => Some(response.header.socket_id),
        _ => None,
    });
    Ok(sockets.collect())
}

fn end(asker: &Asker, family: u8, socket: SocketId) -> io::Result<()> {
    match asker.ask(request(family, socket), NLM_F_ACK, Some(DESTROY)) {
        // It was closed meanwhile.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        answer => answer.map(drop),
    }
}

fn request(family: u8, socket_id: SocketId) -> SockDiagMessage {
    SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: IPPROTO_UDP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::ESTABLISHED,
        socket_id,
    })
}

/// Where a socket sends to: IPv4 if an IPv6 socket does so by IPv4.
const fn canonical(socket: &SocketId) -> IpAddr {
    socket.destination_address.to_canonical()
}
