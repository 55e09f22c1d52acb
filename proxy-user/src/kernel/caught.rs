//! Connections that the second line has caught behind the kernel's NAT (docs/decisions/0025). There they have the node's address, and
//! where their segments come in, the pod's. Which is which, the kernel's own table of connections knows; it is noted for the
//! programs of the pod's link, which leave such a connection to the second line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::maps::{HashMap as HashTable, Map};
use bytemuck::Zeroable;
use proxy_common::tables::{EmbryoValue, FlowKey, Origin, Side, State};
use proxy_common::{Family, Port};

use super::conntrack::{self, Conntrack};
use super::name_of;
use super::read::{FromIp, now};
use super::short_cuts::Keys;
use super::writer::open;

/// Connections that were caught, under the keys that they have where they leave.
pub struct Caught {
    /// The folder of the pinned maps.
    pub maps: PathBuf,
    /// The connections.
    pub keys: Keys,
}

impl Caught {
    /// Notes under which keys they come in. How many have others than where they leave.
    ///
    /// # Errors
    /// If the maps can't be used, or the kernel's table of connections can't.
    pub fn run(&self) -> Result<usize> {
        if !conntrack::is_in_use() {
            return Ok(0);
        }
        let conntrack = Conntrack::open().context("cannot ask for connections by netlink")?;
        Ok(note(&self.maps, &self.keys.v4, &conntrack)?
            + note(&self.maps, &self.keys.v6, &conntrack)?)
    }
}

fn note<F: Family>(maps: &Path, caught: &[FlowKey<F>], conntrack: &Conntrack) -> Result<usize>
where
    F::Addr: FromIp,
{
    if caught.is_empty() {
        return Ok(0);
    }
    let map = Map::LruHashMap(open(maps, &name_of::<F>("embryos"))?);
    let mut embryos: HashTable<_, FlowKey<F>, EmbryoValue<F>> = HashTable::try_from(map)?;
    let mut noted = 0;
    for key in caught {
        let seen_as = SocketAddr::new(key.src.into(), key.sport.number());
        let vip = SocketAddr::new(key.dst.into(), key.dport.number());
        let client =
            conntrack.origin_of(vip, seen_as).context("the kernel's table of connections")?;
        let Some(client) = client.filter(|client| *client != seen_as) else { continue };
        let Some(address) = F::Addr::from_ip(client.ip()) else { continue };
        let from = (address, Port::new(client.port()));
        let comes_in = FlowKey::<F>::new(from, (key.dst, key.dport), key.proto, Side::Egress);
        let origin = Origin { kind: Origin::TURN, ..Origin::NONE };
        let mut value = EmbryoValue::zeroed();
        value.fill(&comes_in, &comes_in, origin, State::Foreign, (now(), 0));
        embryos.insert(comes_in, value, 0).context("cannot note a connection")?;
        noted += 1;
    }
    Ok(noted)
}
