//! The one writer of Services: planned writes become stores and system calls, in their order.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapData};
use proxy_common::tables::{self, Name, Range, RangeData, ServiceKey, ServiceValue};
use proxy_common::{Family, Port, V4, V6};

use super::mapped::Mapped;
use super::read::{FromIp, read_actual};
use crate::desired::{Frontend, PortId};
use crate::model::IpFamily;
use crate::netlink::Exits;
use crate::plan::{Actual, BackendEntry, Capacity, Lead, Op, flags_of};
use crate::routes::{Route, Routes};

/// One family's tables.
pub struct FamilyTables<F: Family> {
    pub services: HashMap<MapData, ServiceKey<F>, ServiceValue>,
    pub ranges: LpmTrie<MapData, RangeData<F>, u32>,
    pub backends: Mapped<tables::Backend<F>>,
    pub loads: Mapped<u32>,
    exits: HashMap<MapData, u32, tables::Exit<F>>,
}

/// All tables that the agent writes.
pub struct Writer {
    pub v4: FamilyTables<V4>,
    pub v6: FamilyTables<V6>,
    pub names: HashMap<MapData, u32, Name>,
    pub slots: Mapped<u64>,
    services: u32,
    ranges: u32,
    /// The ways that lead to backends.
    routes: std::collections::HashMap<IpAddr, Route>,
}

fn open(maps: &Path, name: &str) -> Result<MapData> {
    let path: PathBuf = maps.join(name);
    MapData::from_pin(&path).with_context(|| format!("cannot open the map {}", path.display()))
}

fn open_mapped<T: bytemuck::Pod>(maps: &Path, name: &str) -> Result<Mapped<T>> {
    let map = open(maps, name)?;
    let length = map.info()?.max_entries();
    Mapped::new(map.fd(), length).with_context(|| format!("cannot map {name} into memory"))
}

impl<F: Family> FamilyTables<F> {
    fn open(maps: &Path) -> Result<Self> {
        let services = open(maps, &super::name_of::<F>("services"))?;
        let ranges = open(maps, &super::name_of::<F>("ranges"))?;
        let exits = open(maps, &super::name_of::<F>("exits"))?;
        Ok(Self {
            exits: HashMap::try_from(Map::HashMap(exits))?,
            services: HashMap::try_from(Map::HashMap(services))?,
            ranges: LpmTrie::try_from(Map::LpmTrie(ranges))?,
            backends: open_mapped(maps, &super::name_of::<F>("backends"))?,
            loads: open_mapped(maps, &super::name_of::<F>("loads"))?,
        })
    }

    fn write_backend(&self, number: u32, entry: BackendEntry, route: Option<&Route>)
    where
        F::Addr: FromIp,
    {
        let Some(addr) = F::Addr::from_ip(entry.address.ip()) else { return };
        if self.backends.get(number).generation != entry.generation {
            self.loads.set(number, 0);
        }
        let (source, link, mtu) = way::<F>(route);
        self.backends.set(
            number,
            tables::Backend {
                addr,
                source,
                port: Port::new(entry.address.port()),
                generation: entry.generation,
                flags: flags::<F>(entry),
                service: entry.service,
                link,
                weight: entry.weight,
                mtu,
            },
        );
    }

    /// Makes the table of exits hold these and no others.
    fn set_exits(&mut self, wanted: impl Iterator<Item = (u32, IpAddr)>) -> Result<()>
    where
        F::Addr: FromIp,
    {
        let mut gone: HashSet<u32> = self.exits.keys().filter_map(Result::ok).collect();
        for (link, address) in wanted {
            gone.remove(&link);
            if let Some(address) = F::Addr::from_ip(address) {
                self.exits
                    .insert(link, tables::Exit { address }, 0)
                    .context("cannot write an exit")?;
            }
        }
        for link in gone {
            let _ = self.exits.remove(&link);
        }
        Ok(())
    }

    fn put(&mut self, key: ServiceKey<F>, lead: Lead) -> Result<()> {
        let Lead { id, cluster, local, affinity, flags } = lead;
        let value = ServiceValue { tag: key.tag(), id, cluster, local, affinity, flags };
        self.services.insert(key, value, 0).context("cannot write a Service")
    }

    fn range(address: F::Addr, id: u32, bits: u8) -> Key<RangeData<F>> {
        let data = RangeData { service: id.to_be_bytes(), address };
        Key::new(RangeData::<F>::SERVICE_BITS + u32::from(bits), data)
    }

    fn remove(&mut self, key: ServiceKey<F>) -> Result<()> {
        match self.services.remove(&key) {
            Ok(()) | Err(aya::maps::MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(error).context("cannot remove a Service"),
        }
    }
}

fn flags<F: Family>(entry: BackendEntry) -> u32 {
    flags_of(&[
        (entry.serving, tables::Backend::<F>::SERVING),
        (entry.local, tables::Backend::<F>::LOCAL),
        (entry.usable, tables::Backend::<F>::IN_CLUSTER),
        (entry.usable_local, tables::Backend::<F>::IN_LOCAL),
    ])
}

/// A route as a backend has it.
fn way<F: Family>(route: Option<&Route>) -> (F::Addr, u32, u16)
where
    F::Addr: FromIp,
{
    let known =
        route.and_then(|route| Some((F::Addr::from_ip(route.source)?, route.link, route.mtu)));
    known.unwrap_or_else(|| (bytemuck::Zeroable::zeroed(), 0, 0))
}

/// Runs an expression with the tables of an address's family and the address in them.
macro_rules! with_family {
    ($writer:expr, $ip:expr, |$tables:ident, $address:ident| $body:expr) => {
        match $ip {
            std::net::IpAddr::V4(address) => {
                let ($tables, $address) = (&mut $writer.v4, address.into());
                $body
            }
            std::net::IpAddr::V6(address) => {
                let ($tables, $address) = (&mut $writer.v6, address.into());
                $body
            }
        }
    };
}

impl Writer {
    /// Opens the pinned maps.
    pub fn open(maps: &Path) -> Result<Self> {
        let names = open(maps, "names")?;
        let services = names.info()?.max_entries();
        let ranges = open(maps, &super::name_of::<V4>("ranges"))?.info()?.max_entries();
        Ok(Self {
            v4: FamilyTables::open(maps)?,
            v6: FamilyTables::open(maps)?,
            names: HashMap::try_from(Map::HashMap(names))?,
            slots: open_mapped(maps, "slots")?,
            services,
            ranges,
            routes: std::collections::HashMap::new(),
        })
    }

    /// How much the tables hold.
    pub fn capacity(&self) -> Capacity {
        Capacity {
            services: self.services,
            slots: self.slots.length(),
            backends: self.v4.backends.length().min(self.v6.backends.length()),
            ranges: self.ranges,
        }
    }

    /// What the tables hold.
    pub fn actual(&self) -> Result<Actual> {
        read_actual(self)
    }

    /// Takes in which ways lead to backends, where that has changed: for those written from now on.
    pub fn set_routes(&mut self, changed: &Routes) {
        for (address, route) in changed {
            match route {
                Some(route) => self.routes.insert(*address, *route),
                None => self.routes.remove(address),
            };
        }
    }

    /// Says by which address pods leave the cluster on each link.
    pub fn set_exits(&mut self, exits: &Exits) -> Result<()> {
        let of = |family: usize| {
            exits.iter().filter_map(move |(link, addresses)| Some((*link, addresses[family]?)))
        };
        self.v4.set_exits(of(0))?;
        self.v6.set_exits(of(1))
    }

    /// Carries out one write.
    pub fn apply(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Backend { family, number, backend } => self.backend(*family, *number, *backend),
            Op::Slot { index, number } => self.slots.set(*index, u64::from(*number)),
            Op::Name { id, port } => {
                self.names.insert(id, name_of(port), 0).context("cannot write a name")?;
            }
            Op::Unname { id } => {
                let _ = self.names.remove(id);
            }
            Op::Lead { frontend, lead } => return self.lead(*frontend, *lead),
            Op::Remove { frontend } => {
                let Frontend { vip, port, protocol } = *frontend;
                return with_family!(self, vip, |tables, address| tables.remove(ServiceKey::new(
                    address,
                    Port::new(port),
                    protocol.number()
                )));
            }
            Op::Mark { address, flags } => return self.mark(*address, *flags),
            Op::Unmark { address } => {
                return with_family!(self, *address, |tables, address| tables
                    .remove(ServiceKey::mark(address)));
            }
            Op::Allow { id, range } => {
                return with_family!(self, range.addr(), |tables, address| {
                    let key = FamilyTables::range(address, *id, range.prefix_len());
                    tables.ranges.insert(&key, 1, 0).context("cannot write a source range")
                });
            }
            Op::Forbid { id, range } => {
                with_family!(self, range.addr(), |tables, address| {
                    let key = FamilyTables::range(address, *id, range.prefix_len());
                    let _ = tables.ranges.remove(&key);
                });
            }
        }
        Ok(())
    }

    fn backend(&self, family: IpFamily, number: u32, backend: BackendEntry) {
        let route = self.routes.get(&backend.address.ip());
        match family {
            IpFamily::V4 => self.v4.write_backend(number, backend, route),
            IpFamily::V6 => self.v6.write_backend(number, backend, route),
        }
    }

    fn mark(&mut self, address: IpAddr, flags: u32) -> Result<()> {
        let none = Range::default();
        let lead = Lead { id: 0, cluster: none, local: none, affinity: 0, flags };
        with_family!(self, address, |tables, address| tables.put(ServiceKey::mark(address), lead))
    }

    fn lead(&mut self, frontend: Frontend, lead: Lead) -> Result<()> {
        // What the programs find behind the frontend must be there first.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        let Frontend { vip, port, protocol } = frontend;
        with_family!(self, vip, |tables, address| tables
            .put(ServiceKey::new(address, Port::new(port), protocol.number()), lead))
    }
}

/// A Service port's name as the map holds it. Kubernetes' names are at most 63 bytes long.
fn name_of(port: &PortId) -> Name {
    let field = |text: &str| {
        let mut bytes = [0; 64];
        let length = text.len().min(bytes.len() - 1);
        bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
        bytes
    };
    Name {
        namespace: field(&port.service.namespace),
        service: field(&port.service.name),
        port: field(&port.port),
        proto: port.protocol.number(),
        pad: [0; 7],
    }
}
