//! The one writer of Services: planned writes become stores and system calls, in their order.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use anyhow::{Context, Result};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapData};
use ipnet::IpNet;
use proxy_common::tables::{
    self, Choice, ExitData, ExitKey, Kind, Name, RangeData, ServiceKey, ServiceValue,
};
use proxy_common::{Family, Port, V4, V6};

use super::interest::Interests;
use super::mapped::Mapped;
use super::read::{FromIp, read_actual};
use super::sweep::Counted;
use super::ways::Ways;
use crate::desired::{Frontend, PortId};
use crate::exits::Exits;
use crate::model::IpFamily;
use crate::plan::{Actual, BackendEntry, Capacity, Lead, Op, Use, flags_of};
use crate::routes::{Known, Route, Routes};

/// One family's tables.
pub struct FamilyTables<F: Family> {
    pub services: HashMap<MapData, ServiceKey<F>, ServiceValue>,
    pub ranges: LpmTrie<MapData, RangeData<F>, u32>,
    pub backends: Mapped<tables::Backend<F>>,
    pub loads: Mapped<u32>,
    ways: Ways<F>,
    interest: Interests,
    exits: LpmTrie<MapData, ExitData<F>, tables::Exit<F>>,
    exits_size: usize,
    exhausted: HashMap<MapData, u32, u64>,
    /// Backends whose flows are counted, with their generations.
    counted: std::collections::HashMap<u32, u16>,
}

/// All tables that the agent writes.
pub struct Writer {
    pub v4: FamilyTables<V4>,
    pub v6: FamilyTables<V6>,
    pub names: HashMap<MapData, u32, Name>,
    pub slots: Mapped<[u32; 2]>,
    services: u32,
    ranges: u32,
    /// The ways that lead to backends.
    routes: Known,
}

pub(super) fn open(maps: &Path, name: &str) -> Result<MapData> {
    let path: PathBuf = maps.join(name);
    MapData::from_pin(&path).with_context(|| format!("cannot open the map {}", path.display()))
}

pub(super) fn open_mapped<T: bytemuck::Pod>(maps: &Path, name: &str) -> Result<Mapped<T>> {
    let map = open(maps, name)?;
    let length = map.info()?.max_entries();
    Mapped::new(map.fd(), length).with_context(|| format!("cannot map {name} into memory"))
}

impl<F: Family> FamilyTables<F>
where
    F::Addr: FromIp,
{
    fn open(maps: &Path) -> Result<Self> {
        let services = open(maps, &super::name_of::<F>("services"))?;
        let ranges = open(maps, &super::name_of::<F>("ranges"))?;
        let exits = open(maps, &super::name_of::<F>("exits"))?;
        let exhausted = open(maps, &super::name_of::<F>("exhausted"))?;
        let ways = Ways::new(open_mapped(maps, &super::name_of::<F>("ways"))?);
        let interest = Interests::open::<F>(maps)?;
        Ok(Self {
            ways,
            interest,
            exhausted: HashMap::try_from(Map::HashMap(exhausted))?,
            counted: std::collections::HashMap::new(),
            exits_size: exits.info()?.max_entries() as usize,
            exits: LpmTrie::try_from(Map::LpmTrie(exits))?,
            services: HashMap::try_from(Map::HashMap(services))?,
            ranges: LpmTrie::try_from(Map::LpmTrie(ranges))?,
            backends: open_mapped(maps, &super::name_of::<F>("backends"))?,
            loads: open_mapped(maps, &super::name_of::<F>("loads"))?,
        })
    }

    /// Takes over which ways the backends have that an earlier agent has written, and whose flows are counted.
    fn adopt_rows(&mut self) -> Result<()> {
        let (mut found, mut servers) = (Vec::new(), Vec::new());
        self.counted.clear();
        let both = tables::Backend::<F>::COUNTED | tables::Backend::<F>::SERVING;
        let counted = &mut self.counted;
        let note = |number, row: tables::Backend<F>| {
            if row.generation != 0 {
                found.push(row.way);
                servers.push((row.addr, row.port));
            }
            if row.flags & both == both {
                counted.insert(number, row.generation);
            }
        };
        self.backends.read_to(u32::MAX, note)?;
        // What an agent that was cut off may have left without them.
        for (address, port) in servers {
            self.interest.add_endpoint(&address, port)?;
        }
        for (key, value) in self.services.iter().filter_map(Result::ok) {
            self.interest.add_service(&key, value.flags)?;
        }
        self.ways.clear();
        found.into_iter().try_for_each(|way| self.ways.adopt(way)).context("cannot read the ways")
    }

    fn write_backend(
        &mut self,
        number: u32,
        entry: BackendEntry,
        route: Option<&Route>,
    ) -> io::Result<()> {
        let Some(addr) = F::Addr::from_ip(entry.address.ip()) else { return Ok(()) };
        let before = self.backends.get(number)?;
        if before.generation != entry.generation {
            self.loads.set(number, 0)?;
        }
        if entry.counted && entry.serving {
            self.counted.insert(number, entry.generation);
        } else {
            self.counted.remove(&number);
        }
        self.interest.add_endpoint(&addr, Port::new(entry.address.port()))?;
        if let Some(source) = route.and_then(|route| F::Addr::from_ip(route.source)) {
            self.interest.add(&source, Kind::Node)?;
        }
        let now = Instant::now();
        let way = self.ways.take(now, route)?;
        // What is behind the number must be there first.
        fence(Ordering::Release);
        self.backends.set(
            number,
            tables::Backend {
                addr,
                port: Port::new(entry.address.port()),
                generation: entry.generation,
                flags: flags::<F>(entry),
                service: entry.service,
                way,
                weight: entry.weight,
                pad: 0,
            },
        )?;
        self.ways.leave(now, before.way)
    }

    /// Which backends got no source port for how many flows, and forgets it.
    fn take_exhausted(&mut self) -> Vec<((u32, SocketAddr), u64)> {
        let counts: Vec<(u32, u64)> = self.exhausted.iter().filter_map(Result::ok).collect();
        let backend = |(number, count): (u32, u64)| {
            let _ = self.exhausted.remove(&number);
            let is_there = number < self.backends.length();
            let row = is_there.then(|| self.backends.get(number).ok()).flatten()?;
            let address = SocketAddr::new(row.addr.into(), row.port.number());
            Some(((row.service, address), count))
        };
        counts.into_iter().filter_map(backend).collect()
    }

    fn unmap(&mut self) {
        self.backends.unmap();
        self.interest.unmap();
        self.loads.unmap();
    }

    /// How much is in use of the ways and the exits.
    fn usage(&self) -> [Use; 2] {
        let of = |table: &str, (used, size)| Use { table: super::name_of::<F>(table), used, size };
        let exits = self.exits.keys().flatten().count();
        [of("ways", self.ways.usage()), of("exits", (exits, self.exits_size))]
    }

    /// Makes the table of exits hold these and no others.
    fn set_exits(&mut self, wanted: &Exits) -> Result<()> {
        let all = |link: &u32, (toward, exit): &(IpNet, IpAddr)| {
            let toward_ip = F::Addr::from_ip(toward.addr())?;
            let key = ExitKey::<F>::new(*link, toward_ip, toward.prefix_len().into());
            Some((Key::new(key.prefix, key.data), F::Addr::from_ip(*exit)?))
        };
        let wanted: Vec<_> = wanted
            .iter()
            .flat_map(|(link, exits)| exits.iter().filter_map(|exit| all(link, exit)))
            .collect();
        for (key, address) in &wanted {
            self.interest.add(address, Kind::Node).context("cannot write what is of interest")?;
            self.exits
                .insert(key, tables::Exit { address: *address }, 0)
                .context("cannot write an exit")?;
        }
        let is_wanted = |key: &Key<ExitData<F>>| {
            wanted.iter().any(|(other, _)| {
                (other.prefix_len(), other.data()) == (key.prefix_len(), key.data())
            })
        };
        let known: Vec<_> = self.exits.keys().filter_map(Result::ok).collect();
        for key in known.iter().filter(|key| !is_wanted(key)) {
            let _ = self.exits.remove(key);
        }
        Ok(())
    }

    fn put(&mut self, key: ServiceKey<F>, lead: Lead) -> Result<()> {
        let Lead { id, cluster, local, affinity, flags } = lead;
        let mut value = ServiceValue { tag: 0, id, cluster, local, affinity, flags };
        value.tag = value.tag_of(&key);
        // Whoever asks must pass these first.
        self.interest.add_service(&key, flags).context("cannot write what is of interest")?;
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
        (entry.counted, tables::Backend::<F>::COUNTED),
    ])
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
            routes: Known::default(),
        })
    }

    /// How much the tables hold.
    pub fn capacity(&self) -> Capacity {
        Capacity {
            services: self.services,
            slots: self.slots.length() * 2,
            backends: self.v4.backends.length().min(self.v6.backends.length()),
            ranges: self.ranges,
        }
    }

    /// What the tables hold.
    pub fn actual(&self) -> Result<Actual> {
        read_actual(self)
    }

    /// Takes over what an earlier agent has written, and says what that is.
    pub fn take_over(&mut self) -> Result<Actual> {
        self.v4.adopt_rows()?;
        self.v6.adopt_rows()?;
        self.actual()
    }

    /// Takes in which ways lead to backends, where that has changed: for those written from now on.
    pub fn set_routes(&mut self, routes: &Routes) -> HashSet<IpAddr> {
        let is_new = |(address, route): &(&IpAddr, &Option<Route>)| {
            !self.routes.has(**address) || self.routes.get(**address) != **route
        };
        let changed = routes.iter().filter(is_new).map(|(address, _)| *address).collect();
        routes.iter().for_each(|(address, route)| self.routes.insert(*address, *route));
        changed
    }

    /// Forgets the ways to all other addresses.
    pub fn keep_routes(&mut self, wanted: &HashSet<IpAddr>) {
        self.routes.keep_only(wanted);
    }

    /// Gives back the memory that the tables take up while they are written to.
    pub fn unmap(&mut self) {
        self.slots.unmap();
        self.v4.unmap();
        self.v6.unmap();
    }

    /// How much is in use of the tables that the planner knows nothing of.
    pub fn usage(&self) -> Vec<Use> {
        self.v4.usage().into_iter().chain(self.v6.usage()).collect()
    }

    /// Says by which addresses is masqueraded what leaves by each link.
    pub fn set_exits(&mut self, exits: &Exits) -> Result<()> {
        self.v4.set_exits(exits)?;
        self.v6.set_exits(exits)
    }

    /// Carries out one write.
    pub fn apply(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Backend { family, number, backend } => {
                return self.backend(*family, *number, *backend).context("cannot write a backend");
            }
            Op::Slots { first, numbers } => {
                // Some are in use already; the backends that they name were written before.
                fence(Ordering::Release);
                return (*first..)
                    .zip(numbers)
                    .try_for_each(|(index, number)| self.set_slot(index, *number))
                    .context("cannot write slots");
            }
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

    fn set_slot(&self, index: u32, number: u32) -> io::Result<()> {
        let mut pair = self.slots.get(index / 2)?;
        pair[index as usize % 2] = number;
        self.slots.set(index / 2, pair)
    }

    /// The backends whose flows are counted.
    pub fn counted(&self) -> Counted {
        [self.v4.counted.clone(), self.v6.counted.clone()]
    }

    /// Which backends got no source port for how many flows since they were asked for last.
    pub fn take_exhausted(&mut self) -> BTreeMap<(u32, SocketAddr), u64> {
        self.v4.take_exhausted().into_iter().chain(self.v6.take_exhausted()).collect()
    }

    fn backend(&mut self, family: IpFamily, number: u32, backend: BackendEntry) -> io::Result<()> {
        let route = self.routes.get(backend.address.ip());
        match family {
            IpFamily::V4 => self.v4.write_backend(number, backend, route.as_ref()),
            IpFamily::V6 => self.v6.write_backend(number, backend, route.as_ref()),
        }
    }

    fn mark(&mut self, address: IpAddr, flags: u32) -> Result<()> {
        let none = Choice::default();
        let lead = Lead { id: 0, cluster: none, local: none, affinity: 0, flags };
        with_family!(self, address, |tables, address| tables.put(ServiceKey::mark(address), lead))
    }

    fn lead(&mut self, frontend: Frontend, lead: Lead) -> Result<()> {
        // What the programs find behind the frontend must be there first.
        fence(Ordering::Release);
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
